"""Carries out the lab's job inside the booted kernel and reports it to the host.

The job is ``/lab/job.json``, or what the first word of the command line names: ``command`` (words), ``environment``,
``files`` (to bring back, where they exist). The report goes through a virtio-serial port, one JSON object a line:

* ``hello``: the kernel's release, and its lockdown state, once Python runs;
* ``output``: a piece of what the command wrote;
* ``file``: name and content (base64);
* ``exit``: the command's exit status. It is the last.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

JOB = Path("/lab/job.json")
PORT_NAME = "lab.report"


def find_report_port() -> Path:
    """Returns the device of the virtio-serial port that the host listens at."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text(encoding="ascii").strip() == PORT_NAME:
            return Path("/dev") / name.parent.name
    raise LookupError(f"no virtio-serial port is called {PORT_NAME}")


def send(port: int, **fields: object) -> None:
    """Sends one line of the report, whole."""
    line = json.dumps(fields).encode() + b"\n"
    while line:
        line = line[os.write(port, line) :]


def read_lockdown() -> str:
    """Returns the line of states with the one in force in brackets, or nothing where there is none."""
    path = Path("/sys/kernel/security/lockdown")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def main() -> int:
    """Runs the command and reports."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else JOB
    job = json.loads(path.read_text(encoding="utf-8"))
    port = os.open(find_report_port(), os.O_RDWR | os.O_CLOEXEC)
    send(port, event="hello", release=os.uname().release, lockdown=read_lockdown())
    environment = {**os.environ, **job["environment"]}
    command = job["command"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while data := os.read(process.stdout.fileno(), 65536):
            send(port, event="output", text=data.decode(errors="replace"))
    for name in job["files"]:
        if Path(name).exists():
            send(port, event="file", name=name, base64=base64.b64encode(Path(name).read_bytes()).decode())
    send(port, event="exit", status=process.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
