"""Who sees what of the real agent: other users at its socket and on loopback."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from exporter.web.settings import DRILL_HEADER
from tests.agents import AgentProcess, open_agent, run_agent
from tests.live import open_guest_process
from tests.live.prometheus_server import find_program
from tests.waiting import wait_until

pytestmark = pytest.mark.live

GROUP, NOBODY = 4242, 65534
SECRET_NAME = "customer-7-database"
UUID = "9f7b7f0e-7a52-4a8e-b7ce-0a4f1d8e5c11"


def run_curl(*words: str, uid: int = NOBODY, groups: Sequence[int] = ()) -> tuple[int, str]:
    command = [find_program("curl"), "-s", "--max-time", "20", *words]
    run = subprocess.run(
        command, user=uid, group=uid, extra_groups=list(groups), cwd="/", capture_output=True, text=True, check=False
    )
    return run.returncode, run.stdout


def open_socket(agent: AgentProcess) -> list[str]:
    """Let everybody connect, as an administrator's chmod would."""
    path = Path(agent.socket.path)
    assert path.stat().st_mode & 0o777 == 0o660
    path.parent.chmod(0o755)
    assert run_curl("--unix-socket", str(path), "http://localhost/metrics")[0] != 0
    path.chmod(0o666)
    return ["--unix-socket", str(path)]


def test_the_kernel_says_who_is_at_the_socket() -> None:
    with open_agent(f"--web.details-group={GROUP}") as agent, open_guest_process(name=SECRET_NAME, port_writes=1):
        at_socket = open_socket(agent)
        search = "http://localhost/-/status?q=customer-7"
        wait_until(lambda: SECRET_NAME in run_curl(*at_socket, search, uid=0)[1], "the name is known")
        drill = ["-X", "POST", "-H", f"{DRILL_HEADER}: 1", "-o", "/dev/null", "-w", "%{http_code}"]
        over_tcp = f"http://127.0.0.1:{agent.port}"
        for groups, uid, sees in (((), NOBODY, False), ((GROUP,), NOBODY, True), ((0,), NOBODY, False), ((), 0, True)):
            _code, body = run_curl(*at_socket, "http://localhost/api/v1/vcpus", uid=uid, groups=groups)
            assert json.loads(body)["details"] is sees
            _code, body = run_curl(*at_socket, search, uid=uid, groups=groups)
            assert (SECRET_NAME in body) is sees
            # There is no such VM: who may ask is told that.
            _code, status = run_curl(*drill, *at_socket, "http://localhost/-/drill?vm=none", uid=uid, groups=groups)
            assert status == ("409" if sees else "403")
            # Over loopback not even root is anybody.
            _code, body = run_curl(f"{over_tcp}/api/v1/vcpus", uid=uid, groups=groups)
            assert json.loads(body)["details"] is False
            assert run_curl(*drill, f"{over_tcp}/-/drill?vm=none", uid=uid, groups=groups)[1] == "403"


def test_metrics_of_ids_have_no_name_wherever_they_go(tmp_path: Path) -> None:
    path = tmp_path / "kvm.prom"
    with open_guest_process(name=SECRET_NAME, uuid=UUID, stats_fds=True, port_writes=1):
        for labels, shows in (("full", True), ("ids", False)):
            flag = f"--web.labels={labels}"
            run_agent("once", flag, f"--output={path}", expect=(0, 1))
            printed = run_agent("once", flag, "--format=prometheus", expect=(0, 1))
            with open_agent(flag) as agent:
                scraped = agent.get_text("/metrics")  # also not for root, as series would change with who scrapes
                assert SECRET_NAME in agent.get_text(f"/-/status?q={SECRET_NAME}")
            for text in (path.read_text(), printed, scraped):
                assert f'uuid="{UUID}"' in text
                assert (SECRET_NAME in text) is shows
        # What is printed for whoever runs it is no metric.
        assert SECRET_NAME in run_agent("once", "--web.labels=ids", expect=(0, 1))


def test_a_simulated_host_has_nothing_to_hide_from_anybody_at_its_socket() -> None:
    with open_agent(command="demo") as agent:
        for at in (open_socket(agent), []):
            host = "localhost" if at else f"127.0.0.1:{agent.port}"
            _code, body = run_curl(*at, f"http://{host}/api/v1/vcpus")
            assert json.loads(body)["details"] is True
