"""The manual page and the shells' completions, generated from the program's own flags."""

from __future__ import annotations

import re

import shtab
from argparse_manpage.manpage import Manpage

from exporter.build_info import NAME
from exporter.cli import build_parser

SUMMARY = "Prometheus exporter for KVM notify VM exits"
SHELLS = ("bash", "zsh", "fish")
# roff; what the parser does not know.
SECTIONS = {
    "exit status": r"""
.BR check ,
.B once
and
.B top
where it prints once exit with 0 if the counters of this host can be read and no VM can have been missed, else with 1.
A wrong flag is 2. Any other failure is 1.
""",
    "files": rf"""
.TP
.I /etc/default/{NAME}
The flags of the systemd units.
.TP
.I /var/lib/{NAME}/state.json
Where the units keep the host's total of notify exits over a restart.
.TP
.I /usr/share/{NAME}
Alert rules and recording rules for Prometheus, dashboards for Grafana, and the sysctl file that
.I {NAME}\-no\-admin.service
wants on some hosts.
""",
}


def render_manual(version: str) -> str:
    """Render the manual page of section 1; its date is that of SOURCE_DATE_EPOCH."""
    page = Manpage(
        build_parser(),
        {"project_name": NAME, "version": version, "description": SUMMARY, "manual_title": "User commands"},
    )
    for heading, text in SECTIONS.items():
        page.add_section(heading, ">", text.strip())
    # To roff, a line that begins with a quote is a request: argparse-manpage lets such lines of the parser through.
    return re.sub(r"^'", r"\\&'", str(page), flags=re.MULTILINE)


def render_completion(shell: str) -> str:
    """Render what completes the program's commands and flags in one of SHELLS."""
    return str(shtab.complete(build_parser(), shell))
