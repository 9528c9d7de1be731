"""What this process may do: read in one place, and unknown where it cannot be read."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.host.private_mount import PrivateMount
from kvm.host.privileges import (
    Privileges,
    parse_effective_capabilities,
    parse_initial_user_namespace,
    parse_mounted,
    parse_seccomp,
    read_initial_pid_namespace,
    read_is_module,
    read_privileges,
    read_security_modules,
)

ALL = 2**41 - 1
UNRESTRICTED = Privileges(uid=0, capabilities=ALL, initial_user_namespace=True, is_seccomp_filtered=False)


def refuse(file_system: str) -> PrivateMount:
    raise OSError(errno.EPERM, "Operation not permitted", file_system)


def test_capabilities_are_read_from_the_bit_set() -> None:
    assert parse_effective_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n") == 0x1FFFFFFFFFF


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        (ALL, ()),
        (None, ()),
        (1 << 19 | 1 << 39, ("CAP_PERFMON", "CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN")),
        (1 << 1 | 1 << 19 | 1 << 21, ()),  # CAP_DAC_OVERRIDE implies CAP_DAC_READ_SEARCH
        (1 << 21, ("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH")),  # CAP_SYS_ADMIN implies CAP_BPF and CAP_PERFMON
    ],
)
def test_capabilities_that_are_missing(held: int | None, missing: tuple[str, ...]) -> None:
    assert Privileges(uid=0, capabilities=held).missing_capabilities == missing


@pytest.mark.parametrize(
    "restricted",
    [
        replace(UNRESTRICTED, capabilities=None),
        replace(UNRESTRICTED, capabilities=ALL & ~(1 << 21)),
        replace(UNRESTRICTED, initial_user_namespace=False),
        replace(UNRESTRICTED, initial_user_namespace=None),
        replace(UNRESTRICTED, is_seccomp_filtered=True),
        replace(UNRESTRICTED, is_seccomp_filtered=None),
    ],
)
def test_what_is_not_known_restricts(restricted: Privileges) -> None:
    assert UNRESTRICTED.is_unrestricted
    assert not restricted.is_unrestricted


@pytest.mark.parametrize(("status", "expected"), [("Seccomp:\t2\n", True), ("Seccomp:\t0\n", False), ("", None)])
def test_a_seccomp_filter(status: str, expected: bool | None) -> None:
    assert parse_seccomp(status) is expected


def test_what_is_mounted() -> None:
    lines = [
        "22 27 0:21 / /proc rw,nosuid shared:5 - proc proc rw",
        "36 23 0:7 / /sys/kernel/security rw shared:8 - securityfs security - fs rw",
        "40 23 0:8 / /mnt/a\\040-\\040tracefs rw - ext4 /dev/vda rw",
    ]
    assert parse_mounted("\n".join(lines)) >= {"proc", "ext4"}
    assert "tracefs" not in parse_mounted("\n".join(lines))
    assert "securityfs" in parse_mounted(lines[1])
    assert read_privileges(Path("/nowhere")).mounted is None
    assert "proc" in (read_privileges().mounted or ())


def test_security_modules_that_cannot_be_read_are_not_absent(tmp_path: Path) -> None:
    assert read_security_modules(tmp_path, refuse) is None
    securityfs = tmp_path / "kernel/security"
    securityfs.mkdir(parents=True)
    assert read_security_modules(tmp_path, refuse) is None
    (securityfs / "lsm").write_text("capability,yama")
    assert read_security_modules(tmp_path, refuse) == ("capability", "yama")
    (securityfs / "lsm").write_text("")
    assert read_security_modules(tmp_path, refuse) == ()


def test_where_kvms_types_are_is_read_or_not_known(tmp_path: Path) -> None:
    module = tmp_path / "module/kvm"
    assert read_is_module(module) is None
    module.mkdir(parents=True)
    assert read_is_module(module) is False
    (module / "initstate").write_text("live\n")
    assert read_is_module(module) is True


@pytest.mark.parametrize(("is_module", "needed"), [(True, True), (False, False), (None, True)])
def test_what_is_not_known_may_be_needed(is_module: bool | None, needed: bool) -> None:
    features = {feature.name: feature for feature in Privileges(uid=1, kvm_is_module=is_module).find_features()}
    assert ("CAP_SYS_ADMIN" in features["trigger"].needs) is needed


def test_where_nothing_can_be_read_nothing_is_claimed(tmp_path: Path) -> None:
    found = read_privileges(tmp_path, tmp_path, refuse)
    assert found == Privileges(uid=found.uid)
    assert not found.is_unrestricted
    assert read_initial_pid_namespace(tmp_path) is None


@given(st.text())
def test_untrusted_text_parses(text: str) -> None:
    assert parse_effective_capabilities(text) is None or "CapEff" in text
    parse_initial_user_namespace(text)
    parse_seccomp(text)


def test_the_machine_itself_can_be_read() -> None:
    privileges = read_privileges()
    assert privileges.capabilities is not None
    assert privileges.initial_user_namespace is not None
    assert not privileges.security_modules or "capability" in privileges.security_modules
