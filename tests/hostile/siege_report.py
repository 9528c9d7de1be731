"""What a siege has to keep to, and the table that says whether it did."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

from exporter.history.rates import MAX_GONE
from kvm.vm_budget import PROCESS_VMS
from tests.hostile.siege import (
    CLIENTS,
    FLOOD_PROCESSES,
    FLOOD_VMS,
    HUNG,
    MAX_FDS,
    Sample,
    Siege,
)

RESIDENT_MB: Final = 200  # of all attacks together; idle clients alone have half of that (test_idle_clients.py)
STEADY_KB: Final = 10_000  # what an agent's memory may grow by itself in a third of the time
BIRTH_KB: Final = 1.5  # a VM that is gone and remembered
FOUND_SECONDS: Final = 20.0  # of which 10 are Prometheus's
STOP_SECONDS: Final = 5.0
LOG_LINES_A_MINUTE: Final = 60
SAMPLES_HEADER: Final = (
    f"{'minute':>8} {'MB':>6} {'peak MB':>8} {'fds':>5} {'threads':>8} {'log lines':>10} {'shown s':>8}"
)


class Row(NamedTuple):
    """One attack or one thing that has to hold."""

    attack: str
    tries: str
    bound: str
    seen: str
    holds: bool


def render_sample(sample: Sample) -> str:
    return (
        f"{sample.seconds / 60:8.1f} {sample.resident_kb / 1024:6.1f} {sample.peak_kb / 1024:8.1f} {sample.fds:5} "
        f"{sample.threads:8} {sample.log_lines:10} {sample.shown_seconds:8.1f}  {sample.errors or ''}"
    )


def render_table(rows: Sequence[Row]) -> str:
    cells = [("attack", "tries", "bound", "seen", "verdict")]
    cells += [(*row[:4], "holds" if row.holds else "BROKEN") for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def render_log(log: Sequence[str]) -> str:
    """The messages of a log, the most frequent first, each with how often it was written."""
    found = Counter(match[1] for line in log if (match := re.search(r'msg=("[^"]*"|\S+)', line)))
    return "\n".join(f"{count:6} {message}" for message, count in found.most_common(12))


def judge(seen: Siege) -> list[Row]:
    """Hold what was seen to the bounds."""
    return [*_judge_local(seen), *_judge_network(seen), *_judge_agent(seen)]


def _judge_local(seen: Siege) -> list[Row]:
    born, good = seen.counts["births"]["born"], seen.scrapes - seen.failed_scrapes
    missed = good - min(seen.honest_scrapes.values())
    shown = [sample.shown_seconds for sample in seen.samples]
    over = FLOOD_PROCESSES * (FLOOD_VMS - PROCESS_VMS)
    flood = f"{FLOOD_PROCESSES * FLOOD_VMS}"
    return [
        Row("VM births by another uid", f"{born:,}", "honest VMs in every scrape", f"{missed} missing", missed == 0),
        Row(
            "standing VM flood",
            flood,
            f"{over} or more over budget",
            f"{seen.over_budget:.0f}",
            seen.over_budget >= over,
        ),
        Row(
            "squatters and births as others",
            f"{born + 1:,}",
            "no owner",
            f"{seen.claimed_owners}",
            not seen.claimed_owners,
        ),
        Row(
            "owners whose lookup hangs",
            f"{HUNG * (len(shown) + 1):,}",
            f"{len(shown)} new VMs named in {FOUND_SECONDS:g} s",
            f"{max(shown):.1f} s",
            max(shown) < FOUND_SECONDS,
        ),
    ]


def _judge_network(seen: Siege) -> list[Row]:
    counts = seen.counts
    peak = seen.samples[-1].peak_kb / 1024
    fds = max(sample.fds for sample in seen.samples)
    guessed, drills = (counts[way].get("200", 0) for way in ("guess", "drill"))
    tries = {way: f"{counts[way].get('tries', 0):,}" for way in CLIENTS}
    tries["idle"] = f"{CLIENTS['idle']:,} in {tries['idle']}"
    unbroken = "scrapes go on"
    turned_away = counts["slow"].get("503", 0) + counts["idle"].get("503", 0)
    return [
        Row("idle clients", tries["idle"], f"under {RESIDENT_MB} MB", f"{peak:.0f} MB at most", peak < RESIDENT_MB),
        Row("slow readers", tries["slow"], unbroken, f"{turned_away} turned away", True),
        Row("guessed passwords", tries["guess"], "none is right", f"{guessed} let in", guessed == 0),
        Row("drills of strangers", tries["drill"], "none is had", f"{drills} had", drills == 0),
        Row("connections without end", tries["exhaust"], f"under {MAX_FDS} fds", f"{fds} at most", fds < MAX_FDS),
        Row("garbage", tries["garbage"], unbroken, f"{counts['garbage'].get('cut', 0):,} cut", True),
    ]


def _judge_agent(seen: Siege) -> list[Row]:
    minutes = max(1.0, seen.seconds / 60)
    third = len(seen.samples) // 3
    middle, last = seen.samples[third : 2 * third], seen.samples[2 * third :]
    grown = _median(last, "resident_kb") - _median(middle, "resident_kb")
    born_a_second = seen.counts["births"]["born"] / seen.seconds
    remembered = [min(float(MAX_GONE), born_a_second * sample.seconds) for sample in (middle[0], last[-1])]
    allowed = STEADY_KB + BIRTH_KB * (remembered[1] - remembered[0])
    threads = max(sample.threads for sample in last) - max(sample.threads for sample in middle)
    fds = _median(last, "fds") - _median(middle, "fds")
    lines = len(seen.log) / (minutes + 1)  # as many as in two windows may fall into the first minute
    crashed = sum("Traceback" in line for line in seen.log)
    pages = sorted(name for name, severity in seen.alerts.items() if severity == "page")
    tickets = sorted(name for name, severity in seen.alerts.items() if severity != "page")
    scraped = f"{seen.scrapes:,} scrapes"
    took = f"{seen.usual_scrape_seconds:.2f} s, all in {seen.longest_scrape_seconds:.2f}"
    longest = f"{seen.failed_scrapes} failed; 99 % in {took}"
    found = f"{max(seen.drills):.1f} s at most"
    return [
        Row("all of it: scrapes", scraped, "0 failed", longest, seen.failed_scrapes == 0),
        Row("all of it: verdicts", scraped, "no false stall", f"{seen.stalls:.0f}", seen.stalls == 0),
        Row("all of it: pages", scraped, "none", f"{', '.join(pages) or 'none'}", not pages),
        Row("all of it: tickets", scraped, "", f"{', '.join(tickets) or 'none'}", True),
        Row(
            "all of it: root's drills",
            f"{len(seen.drills)}",
            f"found in {FOUND_SECONDS:g} s",
            found,
            max(seen.drills) < FOUND_SECONDS,
        ),
        Row(
            "all of it: memory",
            "",
            f"{allowed / 1024:.0f} MB more in a third",
            f"{grown / 1024:+.1f} MB",
            grown < allowed,
        ),
        Row("all of it: fds", "", "no more in the last third", f"{fds:+.0f}", fds <= 50),
        Row("all of it: threads", "", "no more in the last third", f"{threads:+}", threads <= 1),
        Row(
            "all of it: log",
            "",
            f"{LOG_LINES_A_MINUTE} lines a minute, no crash",
            f"{lines:.1f}, {crashed}",
            lines < LOG_LINES_A_MINUTE and not crashed,
        ),
        Row(
            "all of it: SIGTERM",
            "1",
            f"ends in {STOP_SECONDS:g} s",
            f"{seen.stop_seconds:.1f} s, code {seen.exit_code}",
            seen.stop_seconds < STOP_SECONDS and seen.exit_code == 0,
        ),
    ]


def _median(samples: Sequence[Sample], what: str) -> float:
    return float(statistics.median(getattr(sample, what) for sample in samples))
