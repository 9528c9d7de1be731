"""Names of VMs that would keep Python's re busy for ever, or be more than a name."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from kvm.identity.vmm_cmdline import LABEL_BYTES
from tests.agents import AgentProcess, open_agent, run_agent
from tests.live import open_guest_process
from tests.waiting import wait_until

PATTERN = "^([a-z]+-?)+$"  # the id of a VM has digits, so the name alone decides
NAME = "a" * 127 + "!"
SECONDS = 1.0
STOP_SECONDS = 3.0
# What no text for people may have: control characters, and what turns text around or cannot be seen.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_a_hostile_name_at_a_hostile_pattern_costs_nothing(flag: str, tell: Callable[[str], None]) -> None:
    with open_guest_process(name=NAME, stats_fds=True, port_writes=1), open_agent(f"--vm.{flag}={PATTERN}") as agent:
        shown = 1 if flag == "exclude" else 0
        wait_until(lambda: sum(agent.samples("kvm_host_vms").values()) >= 1, "the VM is counted")
        started = time.perf_counter()
        assert sum(("name", NAME) in labels for labels in agent.samples("kvm_vm_info")) == shown
        scraped = time.perf_counter() - started
        started = time.perf_counter()
        assert agent.close() == 0
        stopped = time.perf_counter() - started
        tell(f"--vm.{flag}={PATTERN} and a name of 128 bytes: scrape {scraped:.2f} s, stopped in {stopped:.2f} s")
        assert scraped < SECONDS
        assert stopped < STOP_SECONDS


def test_once_with_it_ends() -> None:
    with open_guest_process(name=NAME, stats_fds=True, port_writes=1):
        started = time.perf_counter()
        run_agent("once", f"--vm.include={PATTERN}", "--format=prometheus")
        assert time.perf_counter() - started < 20


FORGED_TIME = "time=2001-01-01T00:00:00.000Z"
EVIL_NAMES = (
    'web"} 1\nkvm_host_vms{a="',
    "web\n# EOF\n",
    "web\r\nHTTP/1.1 200 OK\r\n\r\n",
    'web" level=ERROR msg="kernel panic',
    f"web\n{FORGED_TIME} level=ERROR msg=forged",
    "web\\",
    "web\\n\\u202e\\x1b",
    "\x1b]0;owned\x07\x1b[2J\x1b[31mweb",
    "\u202egnp.bew",
    "web\u200b\u2066\ufeff",
    "w" + "\u0336" * 100,
    "\u3164",
    " ",
    "\udcff\udcfe\udc80",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "'\"><svg/onload=alert(1)>&#x3c;",
    "${jndi:ldap://x/a}$(reboot)`reboot`;reboot",
    "../../../../etc/passwd",
    "%s%n%d{0.__class__}{{7*7}}",
    '=HYPERLINK("http://x";"web")',
    "web,uuid=5107a7ed-0000-4000-8000-00000000aaaa,guest=other",
    "x" * 60_000,
)


def test_evil_names_forge_nothing_anywhere(tell: Callable[[str], None]) -> None:
    with ExitStack() as stack:
        guests = [
            stack.enter_context(open_guest_process(name=name, stats_fds=True, port_writes=1)) for name in EVIL_NAMES
        ]
        agent = stack.enter_context(open_agent("--log.level=debug"))
        pids = {str(guest.pid) for guest in guests}
        wait_until(lambda: len(find_ids(agent, pids)) == len(guests), "all are shown")
        vms = find_ids(agent, pids)
        assert len({labels["vm"] for labels in vms.values()}) == len(guests)
        for labels in vms.values():
            assert len(labels["name"].encode()) <= LABEL_BYTES
            assert list(agent.samples("kvm_vcpu_exits_total", vm=labels["vm"])) == [(("vcpu", "0"),)]
        lines = agent.get_text("/metrics").split("\n")
        assert sum(line.startswith("kvm_host_vms{") for line in lines) == len(agent.samples("kvm_host_vms"))
        page = agent.get_text("/")
        assert page.count("<script") == 1
        assert not re.search(r"<(img|svg)\b", page)
        shown = (page, run_agent("once"), run_agent("once", "--format=json"), "\n".join(agent.log))
        for text in shown:
            assert not INVISIBLE.search(text), INVISIBLE.search(text)
        assert len(shown[1].splitlines()) == 1 + sum(agent.samples("kvm_vm_vcpus").values())
        assert len(json.loads(shown[2])["vms"]) == len(agent.samples("kvm_vm_info"))
        assert agent.close() == 0
    for line in agent.log:
        assert re.match(r"time=20\d\d-\S+Z level=[A-Z]+ msg=", line)
        assert not line.startswith(FORGED_TIME)
    tell(f"{len(EVIL_NAMES)} evil names: as many VMs, and no series, line, tag or control character of theirs")


def find_ids(agent: AgentProcess, pids: set[str]) -> dict[str, dict[str, str]]:
    """The labels of these processes' VMs, by pid."""
    found = [dict(labels) for labels in agent.samples("kvm_vm_info")]
    return {labels["pid"]: labels for labels in found if labels["pid"] in pids}
