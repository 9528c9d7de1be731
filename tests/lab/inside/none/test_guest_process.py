"""A guest that never answers costs a test a bounded wait and leaves a message."""

from __future__ import annotations

import os
import signal

import pytest

from tests.live import GuestError, open_guest_process


def test_a_guest_that_does_not_answer_is_given_up() -> None:
    with open_guest_process() as guest:
        os.kill(guest.pid, signal.SIGSTOP)
        guest.send("run 1")
        with pytest.raises(GuestError, match="no 'done' from the guest in time"):
            guest.wait_for("done", timeout_seconds=0.5)


def test_a_guest_that_ends_leaves_its_last_words() -> None:
    with open_guest_process() as guest:
        guest.send("no-such-command")
        with pytest.raises(GuestError, match=r"the guest ended(?s:.*)KeyError: 'no-such-command'"):
            guest.wait_for("done")
