from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.history.kept_total import MAX_BYTES, BadState, KeptTotal, parse_state, read_boot_id, write_state

BOOT, OTHER_BOOT = "3f0c2a5e-boot", "77777777-boot"


def end_agent(path: Path, total: int, boot: str = BOOT) -> None:
    """An agent that has counted so much, and ends in order."""
    kept = KeptTotal(path, boot)
    kept.take()
    kept.keep(total)
    assert kept.succeeded


def test_the_next_agent_goes_on_and_a_boot_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert KeptTotal(path, BOOT).take() == 0
    end_agent(path, 4711)
    assert KeptTotal(path, BOOT).take() == 4711
    end_agent(path, 4711)
    assert KeptTotal(path, OTHER_BOOT).take() == 0
    assert os.listdir(tmp_path) == ["state.json"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_total_is_taken_once(tmp_path: Path) -> None:
    """An agent that was killed has shown more than the file knew: an old total would be counted a second time."""
    path = tmp_path / "state.json"
    end_agent(path, 4711)
    assert KeptTotal(path, BOOT).take() == 4711
    # kill -9
    assert KeptTotal(path, BOOT).take() == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 4000,
        b"4711",
        b"{}",
        b'{"version": 2, "boot_id": "3f0c2a5e-boot", "notify_window_exits_total": 1}',
        b'{"version": 1, "boot_id": "3f0c2a5e-boot", "notify_window_exits_total": -1}',
        b'{"version": 1, "boot_id": "3f0c2a5e-boot", "notify_window_exits_total": 1e3}',
        b'{"version": 1, "boot_id": "3f0c2a5e-boot", "notify_window_exits_total": NaN}',
        b'{"version": 1, "boot_id": "3f0c2a5e-boot", "notify_window_exits_total": true}',
        b'{"version": 1, "boot_id": "3f0c2a5e-boot", "notify_window_exits_total": "1"}',
        b'{"version": 1, "boot_id": "3f0c2a5e-boot", "notify_window_exits_total": 9223372036854775808}',
        b'{"version": 1, "boot_id": "3f0c2a5e-boot", "notify_window_exits_total": 1' + b"0" * 4000 + b"}",
        b" " * (MAX_BYTES + 1),
    ],
)
def test_what_no_agent_has_written_is_told_of_and_replaced(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    kept = KeptTotal(path, BOOT)
    assert (kept.take(), kept.succeeded) == (0, False)
    assert [record.message for record in caplog.records] == ["the total of notify exits begins at 0"]
    kept.keep(5)
    assert KeptTotal(path, BOOT).take() == 5


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_bytes_are_a_total_or_bad(content: bytes) -> None:
    try:
        total = parse_state(content, BOOT)
    except BadState:
        return
    assert total is None


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "device"])
def test_what_is_no_plain_file_is_not_read_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / "state.json", tmp_path / "other"
    end_agent(other, 4711)
    if kind == "link":
        path.symlink_to(other)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    before, fds = other.read_bytes(), os.listdir("/proc/self/fd")
    kept = KeptTotal(path, BOOT)
    assert (kept.take(), kept.succeeded) == (0, False)
    assert other.read_bytes() == before
    assert os.listdir("/proc/self/fd") == fds


def test_who_names_a_directory_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    KeptTotal(tmp_path, BOOT).take()
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    assert "Is a directory" in fields[0]["err"]
    assert fields[-1]["remedy"] == "name a file in that directory"


def test_a_file_put_where_the_new_one_is_written_is_not_written_through(tmp_path: Path) -> None:
    path, victim = tmp_path / "state.json", tmp_path / "victim"
    victim.write_text("mine\n")
    (tmp_path / ".state.json.new").symlink_to(victim)
    end_agent(path, 1)
    assert victim.read_text() == "mine\n"
    (tmp_path / ".state.json.new").hardlink_to(victim)
    end_agent(path, 2)
    assert victim.read_text() == "mine\n"


def test_where_nothing_can_be_written_no_old_total_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.json"
    end_agent(path, 4711)
    # It cannot be removed as a file can, so the new file cannot be made.
    (tmp_path / ".state.json.new").mkdir()
    kept = KeptTotal(path, BOOT)
    assert (kept.take(), kept.succeeded) == (0, False)
    assert [record.message for record in caplog.records] == ["the total of notify exits cannot be kept"]
    (tmp_path / ".state.json.new").rmdir()
    assert KeptTotal(path, BOOT).take() == 0, "the one before has shown less by now"


def test_a_writer_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Killed at some moment of thousands of writes: what is there is whole."""
    path = tmp_path / "state.json"
    program = (
        "import sys; from pathlib import Path; from exporter.history.kept_total import KeptTotal\n"
        "kept = KeptTotal(Path(sys.argv[1]), 'b')\n"
        "for total in range(10**9):\n"
        "    kept.keep(total); print(total, flush=True)\n"
    )
    for rounds in (1, 7, 30):
        with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            told = [int(writer.stdout.readline()) for _ in range(rounds)]
            writer.kill()
        total = KeptTotal(path, "b").take()
        assert told[-1] <= total
    write_state(path, "x")


def test_where_the_boot_is_not_known_no_total_goes_on_then_or_later(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    end_agent(path, 4711)
    kept = KeptTotal(path, None)
    assert (kept.take(), kept.succeeded) == (0, False)
    kept.keep(5)
    assert KeptTotal(path, None).take() == KeptTotal(path, BOOT).take() == 0


def test_the_boot_has_a_name(tmp_path: Path) -> None:
    assert len(read_boot_id(Path("/proc")) or "") == 36
    assert read_boot_id(tmp_path) is None
