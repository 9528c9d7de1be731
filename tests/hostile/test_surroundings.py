"""A clock that jumps, and disks that are full: the agent goes on, and claims nothing that is not so."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from exporter.commands.agent_socket import ask_agent
from exporter.commands.drill import ask_for_drill
from exporter.web.listeners import UnixAddress
from tests.agents import ROOT, open_agent, run_agent
from tests.live import open_guest_process
from tests.waiting import wait_until

UUID = "5107a7ed-0000-4000-8000-00000000c10c"
DAY = 86400
JUMPS = (DAY, -7 * DAY, 3650 * DAY, -1, 0)
CLOCK = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *ahead;

__attribute__((constructor)) static void open_file(void)
{
	int fd = open(getenv("CLOCK_AHEAD"), O_RDONLY | O_CLOEXEC);

	ahead = mmap(NULL, sizeof(*ahead), PROT_READ, MAP_SHARED, fd, 0);
	close(fd);
}

int clock_gettime(clockid_t id, struct timespec *now)
{
	int failed = syscall(SYS_clock_gettime, id, now);

	if (!failed && id == CLOCK_REALTIME)
		now->tv_sec += *ahead;
	return failed;
}
"""
# A file system that is full, seen by what is run in it only.
FULL = (
    'mount -t tmpfs -o size=16k tmpfs /mnt && cp "$1" /mnt/ && ! cat /dev/zero >/mnt/fill 2>/dev/null; shift; exec "$@"'
)


def test_a_clock_that_jumps_makes_no_stall_and_ends_none(tmp_path: Path, tell: Callable[[str], None]) -> None:
    """The agent's wall clock is another one's, by LD_PRELOAD: to set this machine's would hit others."""
    library, ahead = tmp_path / "clock.so", tmp_path / "ahead"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, "-xc", "-"], input=CLOCK, text=True, check=True)
    ahead.write_bytes(struct.pack("=q", 0))
    prefix = ("env", f"LD_PRELOAD={library}", f"CLOCK_AHEAD={ahead}")
    with open_guest_process(uuid=UUID, stats_fds=True, port_writes=1) as guest, open_agent(prefix=prefix) as agent:
        vm = f"{UUID}-{guest.pid}"
        wait_until(lambda: agent.samples("kvm_vcpu_exits_total", vm=vm), "the guest is shown")
        ask_for_drill(agent.socket, vm)
        with ahead.open("r+b", buffering=0) as file:
            for seconds in JUMPS:
                file.seek(0)
                file.write(struct.pack("=q", seconds))
                began = time.monotonic()
                assert agent.samples("kvm_vcpu_exits_total", vm=vm)
                assert time.monotonic() - began < 2
                assert agent.samples("kvm_vcpu_no_forward_progress") == {}
                (drill,) = (vcpu for vcpu in agent.get_json("/api/v1/vcpus")["vcpus"] if vcpu["drill"])
                assert drill["state"] == "stalled"
                assert abs(drill["stuck_since_unix_seconds"] - (time.time() + seconds)) < 60
        assert agent.get()[0] == 200
        assert agent.close() == 0
    assert not any("Traceback" in line for line in agent.log)
    tell(f"jumps of the clock by {', '.join(f'{seconds / DAY:g} d' for seconds in JUMPS)}: one drill all the while")


def test_a_disk_that_is_full_costs_what_would_stand_there(tmp_path: Path) -> None:
    old = tmp_path / "kvm.prom"
    old.write_text("old\n")
    prefix = ("unshare", "--mount", "--propagation=private", "sh", "-c", FULL, "sh", str(old))
    with open_agent("--state.file=/mnt/state.json", prefix=prefix) as agent:
        assert agent.samples("kvm_exporter_state_file_success") == {(): 0}
        for _ in range(50):
            assert agent.get()[0] == 200
        assert sum("No space left on device" in line for line in agent.log) == 1
        assert agent.close() == 0
    assert sum("No space left on device" in line for line in agent.log) == 2
    shown = ("sh", "-c", '"$@"; code=$?; ls -A /mnt; cat /mnt/kvm.prom; exit $code', "sh")
    printed = run_agent("once", "--output=/mnt/kvm.prom", prefix=(*prefix, *shown), expect=[1])
    assert printed.splitlines() == ["fill", "kvm.prom", "old"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    path = UnixAddress(str(tmp_path / "agent.sock"))
    words = [sys.executable, "-m", "exporter", "serve", "--log.level=debug", f"--web.listen-address=unix:{path.path}"]
    with Path("/dev/full").open("w") as full, subprocess.Popen(words, cwd=ROOT, stderr=full) as process:
        try:
            wait_until(Path(path.path).exists, "it listens", 60)
            for _ in range(20):
                assert ask_agent(path, "GET", "/metrics").status == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
