"""The flags of the stall monitor."""

from __future__ import annotations

import pytest

from exporter.cli import parse_command_line
from exporter.monitor.backends import PollMode
from kvm.bpf.notify_trigger import FUNCTION


def test_what_a_stall_is_and_how_it_is_found_can_be_chosen() -> None:
    arguments = parse_command_line(["--stall.exits=20", "--stall.seconds=2.5", "--poll=always", "--no-trigger.bpf"])
    assert (arguments.stall_exits, arguments.stall_seconds) == (20, 2.5)
    assert (arguments.poll, arguments.trigger_bpf) == (PollMode.ALWAYS, False)
    defaults = parse_command_line([])
    assert (defaults.stall_exits, defaults.stall_seconds, defaults.poll) == (10, 1.0, PollMode.AUTO)
    assert (defaults.trigger_bpf, defaults.trigger_function) == (True, FUNCTION)


@pytest.mark.parametrize(
    "words",
    [
        ["--stall.exits=1"],
        ["--stall.exits=ten"],
        ["--stall.seconds=-1"],
        ["--stall.seconds=nan"],
        ["--stall.seconds=inf"],
        ["--poll=never"],
        ["drill"],
        ["demo", "--no-trigger.bpf"],
        ["once", "--poll=always"],
    ],
    ids=" ".join,
)
def test_bad_flags_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_command_line(words)
    assert left.value.code == 2
    assert "usage" in capsys.readouterr().err
