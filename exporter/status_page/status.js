"use strict";
// Keeps the page up to date: asks for the parts that change and puts in what is new, so that focus, selection, scrolling
// and what is typed stay. Whatever it puts in was rendered and escaped by the agent, and is parsed without running.
(() => {
  const PERIOD = 1000, SLOWEST = 30000, PATIENCE = 5000, TYPING = 250, BUSY = 3;
  const box = document.getElementById("q"), clock = document.getElementById("clock");
  const alarm = document.getElementById("alarm"), pause = document.getElementById("pause");
  // The agent's clock, as all times on the page are: the reader's may be wrong.
  let timer = 0, asked = 0, failures = 0, busy = 0, paused = false, etag = "";
  let answered = Date.parse(clock.querySelector("time").dateTime);

  const say = (element, text) => { if (element.textContent !== text) element.textContent = text; };
  const time = (milliseconds) => new Date(milliseconds).toISOString().slice(11, 19);
  const query = () => (box.value.trim() ? "?" + new URLSearchParams({ q: box.value.trim() }) : "");

  function morph(old, fresh) {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.data !== fresh.data) old.data = fresh.data;
      return;
    }
    if (old.isEqualNode(fresh)) return;
    for (const name of old.getAttributeNames()) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    for (const name of fresh.getAttributeNames()) {
      if (old.getAttribute(name) !== fresh.getAttribute(name)) old.setAttribute(name, fresh.getAttribute(name));
    }
    const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
    let place = old.firstChild;
    for (const child of [...fresh.childNodes]) {
      const known = child.id ? named.get(child.id) : place && !place.id && place.nodeName === child.nodeName ? place : null;
      if (!known) {
        old.insertBefore(document.adoptNode(child), place);
        continue;
      }
      if (known === place) place = place.nextSibling;
      else old.insertBefore(known, place);
      morph(known, child);
    }
    while (place) {
      const next = place.nextSibling;
      place.remove();
      place = next;
    }
  }

  function show(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const parts = [...document.querySelectorAll("[data-live]")].map((old) => [old, fresh.getElementById(old.id)]);
    if (parts.some(([, part]) => !part)) throw new Error("what answers is no status page");
    const head = fresh.getElementById("head");
    if (head.dataset.page !== document.getElementById("head").dataset.page) return location.reload();
    const selection = getSelection(), { anchorNode, anchorOffset, focusNode, focusOffset, isCollapsed } = selection;
    for (const [old, part] of parts) morph(old, part);
    document.title = head.dataset.title;
    // A row that has moved has lost it.
    const fits = (node, offset) => node && node.isConnected && offset <= (node.length ?? node.childNodes.length);
    if (!isCollapsed && selection.isCollapsed && fits(anchorNode, anchorOffset) && fits(focusNode, focusOffset)) {
      selection.setBaseAndExtent(anchorNode, anchorOffset, focusNode, focusOffset);
    }
  }

  async function poll() {
    clearTimeout(timer);
    const mine = ++asked, giveUp = new AbortController(), late = setTimeout(() => giveUp.abort(), PATIENCE);
    try {
      const answer = await fetch("-/status" + query(), {
        headers: etag ? { "If-None-Match": etag } : {}, cache: "no-store", signal: giveUp.signal,
      });
      const text = answer.status === 200 ? await answer.text() : "";
      if (mine !== asked) return;
      if (answer.status === 503 && ++busy < BUSY) return; // too many search at once: soon again
      if (answer.status !== 200 && answer.status !== 304) throw new Error("it answers " + answer.status);
      if (text) show(text);
      etag = answer.headers.get("ETag") || "";
      answered = Date.parse(answer.headers.get("Date")) || answered;
      failures = busy = 0;
      say(alarm, "");
      say(clock, (paused ? "Paused: as of " : "As of ") + time(answered) + " UTC");
    } catch (error) {
      if (mine !== asked) return;
      failures += 1;
      const why = error.message.startsWith("it answers") ? " (" + error.message + ")" : "";
      say(alarm, "No answer from the agent since " + time(answered) + " UTC" + why + ": what is shown is old.");
      say(clock, paused ? "Paused: asked in vain" : "Asked in vain, asking again");
    } finally {
      clearTimeout(late);
      if (mine === asked) {
        document.documentElement.classList.toggle("is-stale", failures > 0);
        // Not all at once, where too many ask.
        plan(Math.min(SLOWEST, PERIOD * 2 ** Math.min(failures, 10) * (busy ? 1 + Math.random() : 1)));
      }
    }
  }

  function plan(delay) {
    clearTimeout(timer);
    if (!paused && !document.hidden) timer = setTimeout(poll, delay);
  }

  box.addEventListener("input", () => {
    clearTimeout(timer);
    asked += 1; // an answer to the old question is none to the new one
    timer = setTimeout(() => {
      history.replaceState(null, "", query() || location.pathname);
      poll();
    }, TYPING);
  });
  box.form.addEventListener("submit", (event) => {
    event.preventDefault();
    history.replaceState(null, "", query() || location.pathname);
    poll();
  });
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    if (!paused) return poll();
    clearTimeout(timer);
    asked += 1;
    say(clock, "Paused: as of " + time(answered) + " UTC");
  });
  document.addEventListener("visibilitychange", () => { if (document.hidden) clearTimeout(timer); else plan(0); });
  pause.hidden = false;
  plan(PERIOD);
})();
