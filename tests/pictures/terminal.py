"""The picture of a terminal: what the agent logs of a stuck vCPU, on its simulated host, and what it exports then."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Final
from urllib.parse import quote

from tests.agents import AgentProcess, open_agent
from tests.live.chromium import open_tab
from tests.pictures.png import shrink

WIDTH: Final = 1200
STALL_SECONDS: Final = 60.0
METRICS: Final = r'^kvm_vcpu_.*vcpu="0",vm="5107a7ed-0000-4000-8000-000000000002"'
# What is typed, and where it listens then.
COMMANDS: Final = ("kvm-notify-exporter demo", f"curl -s http://127.0.0.1:9750/metrics | grep -E '{METRICS}'")
ADDRESS: Final = "127.0.0.1:9750"
STYLE: Final = """
body { margin: 0; background: #16181d; color: #d5d8de; font: 14px/1.45 "DejaVu Sans Mono", monospace }
pre { margin: 0; padding: 16px 20px; white-space: pre-wrap; overflow-wrap: anywhere; font: inherit }
b { color: #fff } i { color: #f3be00; font-style: normal }
"""


def draw_terminal(path: Path) -> None:
    """Write the picture; takes half a minute."""
    with open_agent(command="demo") as agent:
        if not agent.wait_for_log(lambda: any("forward progress" in line for line in agent.log), STALL_SECONDS):
            raise RuntimeError(f"no vCPU got stuck: {agent.log}")
        text = f"{_show_log(agent)}\n\n{_show_metrics(agent)}"
    page = f"<!DOCTYPE html><meta charset=utf-8><style>{STYLE}</style><pre>{text}</pre>"
    with open_tab() as tab:
        tab.resize(WIDTH, 100)
        tab.open(f"data:text/html,{quote(page)}")
        tab.make_status_view(path)
    shrink(path)


def _show_log(agent: AgentProcess) -> str:
    # At whatever port it listens here.
    lines = [re.sub(r"127\.0\.0\.1:\d+", ADDRESS, line) for line in agent.log if "address=unix" not in line]
    shown = [re.sub(r"^.* level=WARN .*$", r"<i>\g<0></i>", html.escape(line, quote=False)) for line in lines]
    return "\n".join([f"<b>$ {COMMANDS[0]} &amp;</b>", *shown])


def _show_metrics(agent: AgentProcess) -> str:
    lines = [line for line in agent.get()[2].decode().splitlines() if re.match(METRICS, line)]
    shown = [html.escape(line, quote=False) for line in lines]
    return "\n".join([f"<b>$ {html.escape(COMMANDS[1], quote=False)}</b>", *shown])
