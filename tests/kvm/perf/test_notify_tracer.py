"""What is asked of the kernel, how its records are understood, and what is said where something is missing."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.errors import SourceUnavailable, VmGone
from kvm.host.private_mount import PrivateMount
from kvm.host.privileges import Privileges
from kvm.model import NotifyExit
from kvm.perf.event import count_pages, open_event
from kvm.perf.notify_records import NOTIFY_FILTER, build_mask_filter, decode_notify_exit
from kvm.perf.notify_tracer import NotifyTracer
from kvm.perf.refusals import explain
from kvm.perf.ring import Sample
from kvm.perf.tracefs import open_tracefs, parse_tracefs_mounts
from kvm.perf.tracepoint_format import Tracepoint, parse_format

CAPTURES = Path(__file__).parents[2] / "fixtures" / "tracepoints"
KERNELS = sorted(path.stem for path in CAPTURES.glob("*.format"))
NOTIFY, VMX, SVM = 75, 1, 2
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
ALL_RIGHTS = Privileges(uid=0, capabilities=2**41 - 1, perf_event_paranoid=3, initial_user_namespace=True)
SYS_ADMIN, PERFMON = 1 << 21, 1 << 38


def read_tracepoint(kernel: str) -> Tracepoint:
    return parse_format((CAPTURES / f"{kernel}.format").read_text(), kernel)


def pack(tracepoint: Tracepoint, **values: int) -> Sample:
    raw = bytearray(tracepoint.size)
    for name, value in values.items():
        offset, size, _ = tracepoint.fields[name]
        raw[offset : offset + size] = value.to_bytes(size, "little")
    return Sample(1, 123, bytes(raw))


def holds(event_filter: str, **fields: int) -> bool:
    """Whether a filter of the kernel's grammar lets a record pass: && and ! mean what `and` and `not` mean here."""
    return bool(eval(event_filter.replace("&&", "and").replace("!(", "not ("), {}, fields))


@given(st.one_of(U32, st.integers(0, 2**16 - 1).map(lambda high: high << 16 | NOTIFY)), st.sampled_from([VMX, SVM]))
def test_the_filter_lets_notify_exits_pass_and_nothing_else(reason: int, isa: int) -> None:
    assert holds(NOTIFY_FILTER, exit_reason=reason, isa=isa) == (reason & 0xFFFF == NOTIFY and isa == VMX)


@given(st.integers(0, 255), st.integers(1, 255), st.integers(0, 255))
def test_mask_filters(field: int, mask: int, value: int) -> None:
    assert holds(build_mask_filter("field", value & mask, mask), field=field) == (field & mask == value & mask)


def test_the_filter_fits_what_ioctl_can_pass() -> None:
    assert len(NOTIFY_FILTER) < 1024  # fcntl.ioctl copies that much


@pytest.mark.parametrize("kernel", KERNELS)
@given(high=st.integers(0, 2**16 - 1), rip=U64, info1=U64, info2=U64)
def test_records_of_each_kernel(kernel: str, high: int, rip: int, info1: int, info2: int) -> None:
    tracepoint = read_tracepoint(kernel)
    sample = pack(tracepoint, exit_reason=high << 16 | NOTIFY, isa=VMX, guest_rip=rip, info1=info1, info2=info2)
    known = None if high >> 11 & 1 else rip  # bit 27 of the reason: in an SGX enclave
    assert decode_notify_exit(tracepoint, sample, 42) == NotifyExit(123, 42, known, info1, info2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rip", [0, 1, 0x7F0000001234])
def test_a_rip_is_unknown_in_an_enclave_only(kernel: str, rip: int) -> None:
    tracepoint = read_tracepoint(kernel)
    outside = pack(tracepoint, exit_reason=NOTIFY, isa=VMX, guest_rip=rip)
    assert decode_notify_exit(tracepoint, outside, 42) == NotifyExit(123, 42, rip, 0, 0)
    inside = pack(tracepoint, exit_reason=NOTIFY | 1 << 27, isa=VMX, guest_rip=rip)
    assert decode_notify_exit(tracepoint, inside, 42) == NotifyExit(123, 42, None, 0, 0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("reason", "isa"), [(NOTIFY, SVM), (NOTIFY | 0x1000, VMX), (0x7B, VMX), (0, VMX)])
def test_other_exits_are_not_taken_for_notify_exits(kernel: str, reason: int, isa: int) -> None:
    tracepoint = read_tracepoint(kernel)
    assert decode_notify_exit(tracepoint, pack(tracepoint, exit_reason=reason, isa=isa), 42) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_records_that_are_too_short_are_not_taken_for_anything(kernel: str) -> None:
    tracepoint = read_tracepoint(kernel)
    whole = pack(tracepoint, exit_reason=NOTIFY, isa=VMX, guest_rip=1)
    needed = tracepoint.fields["info2"].offset + 8
    decoded = [decode_notify_exit(tracepoint, whole._replace(raw=whole.raw[:n]), 42) for n in range(len(whole.raw) + 1)]
    assert decoded == [None] * needed + [NotifyExit(123, 42, 1, 0, 0)] * (len(whole.raw) + 1 - needed)


def test_the_ring_has_room_for_what_is_allowed() -> None:
    for size, records in itertools.product((60, 72, 200), (1, 66, 5000)):
        pages = count_pages(size, records)
        # header, id, time, size of the raw data, the data, padding to 8
        assert pages * 4096 >= records * (8 + 8 + 8 + 4 + size + 7)
        assert pages & pages - 1 == 0
        assert pages == 1 or pages * 2048 < records * (36 + size + 8)


@pytest.mark.parametrize("tid", [0, -1])
def test_ourselves_and_everybody_are_no_threads(tid: int) -> None:
    with pytest.raises(ValueError, match="no thread"):
        open_event(1, tid)


def test_a_tracer_that_is_not_open_says_so() -> None:
    tracer = NotifyTracer(Path("/nowhere"))
    for call in (lambda: tracer.arm(1), tracer.hold_warm):
        with pytest.raises(SourceUnavailable, match="not open"):
            call()
    tracer.release_warm()
    tracer.close()


MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:7 / /sys/kernel/debug rw,relatime shared:5 - debugfs none rw
31 22 0:12 / /sys/kernel/tracing rw,nosuid shared:6 master:2 - tracefs tracefs rw
44 22 0:12 / /mnt/with\\040space\\134 rw - tracefs none rw,gid=5
45 22 0:13 / /mnt/tracefs rw - tmpfs tracefs rw
"""


def refuse_mount(file_system: str) -> PrivateMount:
    raise OSError(errno.EPERM, "Operation not permitted", file_system)


class FakeHost:
    """Roots of a simulated host."""

    def __init__(self, root: Path) -> None:
        self.tracefs, self.proc, self.sysfs = root / "tracing", root / "proc", root / "sys"
        (self.proc / "self").mkdir(parents=True)
        self.mount_tracefs_at()

    def mount_tracefs_at(self, *places: Path) -> None:
        lines = [f"31 22 0:12 / {place} rw - tracefs none rw\n" for place in places]
        (self.proc / "self/mountinfo").write_text("".join(lines))

    def lock_down(self, mode: str) -> None:
        path = self.sysfs / "kernel/security/lockdown"
        path.parent.mkdir(parents=True)
        path.write_text(f"none integrity [{mode}]")

    def write_format(self, text: str, tracefs: Path | None = None) -> None:
        directory = (tracefs or self.tracefs) / "events/kvm/kvm_exit"
        directory.mkdir(parents=True)
        (directory / "format").write_text(text)

    def find(self) -> Path:
        return open_tracefs(self.tracefs, self.proc, self.sysfs, refuse_mount).path

    def refuse(self) -> SourceUnavailable:
        with pytest.raises(SourceUnavailable) as caught:
            NotifyTracer(self.tracefs, proc=self.proc, sysfs=self.sysfs, open_private=refuse_mount).open()
        return caught.value


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def test_a_private_instance_that_may_not_be_read_is_a_refusal(host: FakeHost, tmp_path: Path) -> None:
    closed: list[str] = []

    class Private:
        """A mount whose path is too long to be looked up: an error as good as EACCES, which root never gets."""

        path = tmp_path / ("n" * 300)

        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    with pytest.raises(SourceUnavailable, match="a private instance of it may not be read") as refused:
        open_tracefs(host.tracefs, host.proc, host.sysfs, Private)  # type: ignore[arg-type]
    assert "CAP_DAC_READ_SEARCH" in refused.value.remedy
    assert "tracefs" in closed


def test_mounts_of_tracefs_and_their_strange_names() -> None:
    assert parse_tracefs_mounts(MOUNTINFO) == (Path("/sys/kernel/tracing"), Path("/mnt/with space\\"))


def test_tracefs_is_found_wherever_it_is(host: FakeHost, tmp_path: Path) -> None:
    elsewhere, below_debugfs = tmp_path / "elsewhere", host.sysfs / "kernel/debug/tracing"
    host.mount_tracefs_at(tmp_path / "gone", elsewhere)
    for place in (elsewhere, below_debugfs, host.tracefs):  # a better one each time
        (place / "events").mkdir(parents=True)
        assert host.find() == place


def test_no_tracefs(host: FakeHost) -> None:
    problem = host.refuse()
    nowhere = f"tracefs is not mounted at {host.tracefs} or anywhere else"
    assert problem.reason == f"{nowhere}, and this process may not open it (Operation not permitted)"
    assert problem.remedy.startswith(f"mount -t tracefs tracefs {host.tracefs}, or give CAP_SYS_ADMIN")


def test_without_proc_the_usual_places_are_tried(host: FakeHost) -> None:
    (host.proc / "self/mountinfo").unlink()
    assert "not mounted" in host.refuse().reason


def test_lockdown_is_named_where_tracefs_is_empty(host: FakeHost) -> None:
    host.lock_down("confidentiality")
    host.tracefs.mkdir()
    assert host.refuse().reason.startswith("lockdown=confidentiality")


def test_lockdown_is_not_blamed_for_what_it_does_not_do(host: FakeHost) -> None:
    host.lock_down("integrity")
    assert "not mounted" in host.refuse().reason


def test_a_place_that_may_not_be_looked_into(tmp_path: Path) -> None:
    """Root may look into anything, so another error has to do: a name that is too long."""
    host = FakeHost(tmp_path)
    host.tracefs = tmp_path / ("x" * 300)
    problem = host.refuse()
    assert "File name too long" in problem.reason
    assert "CAP_DAC_READ_SEARCH" in problem.remedy


def test_no_kvm(host: FakeHost) -> None:
    (host.tracefs / "events").mkdir(parents=True)
    problem = host.refuse()
    assert "the module kvm is not loaded" in problem.reason
    assert problem.remedy == "load kvm_intel or kvm_amd"


def test_a_format_that_cannot_be_read(host: FakeHost) -> None:
    (host.tracefs / "events/kvm/kvm_exit/format").mkdir(parents=True)
    assert host.refuse().reason.endswith("events/kvm/kvm_exit: Is a directory")


def test_a_format_that_makes_no_sense(host: FakeHost) -> None:
    host.write_format("name: kvm_exit\n")
    problem = host.refuse()
    assert "has no name or no ID" in problem.reason
    assert str(host.tracefs) in problem.reason


def test_fields_that_are_needed_and_missing(host: FakeHost) -> None:
    text = (CAPTURES / "linux-6.1.format").read_text()
    host.write_format(text.replace(" info2;", " renamed;").replace(" isa;", " instruction_set;"))
    assert host.refuse().reason == "the records of kvm:kvm_exit have no isa, info2 on this kernel"


@pytest.mark.parametrize(
    ("err", "privileges", "words"),
    [
        (OSError(errno.ENOSYS, "x"), {}, "this kernel has no perf events; use a kernel with CONFIG_PERF_EVENTS"),
        (OSError(errno.EACCES, "x"), {"capabilities": 0}, "missing capability: CAP_PERFMON"),
        (OSError(errno.EPERM, "x"), {"capabilities": SYS_ADMIN}, "although no capability is missing"),
        (
            OSError(errno.EACCES, "x"),
            {"capabilities": PERFMON},
            "perf_event_paranoid is 3 or more: tracing takes",
        ),
        (OSError(errno.EPERM, "x"), {"is_seccomp_filtered": True}, "perhaps a seccomp filter forbids perf_event_open"),
        (OSError(errno.EPERM, "x"), {"initial_user_namespace": False}, "run in the host's user namespace"),
        (OSError(errno.EPERM, "x", "mmap"), {}, "perf_event_mlock_kb"),
        (OSError(errno.EACCES, "x"), {"selinux_enforcing": True, "label": "svirt_t"}, "SELinux may .* svirt_t"),
        (OSError(errno.EINVAL, "x"), {}, "does not know the tracepoint any more"),
        (OSError(errno.EMFILE, "x"), {}, "LimitNOFILE"),
        (OSError(errno.ENOMEM, "no memory"), {}, "no memory"),
    ],
    ids=str,
)
def test_refusals_are_explained(err: OSError, privileges: dict[str, object], words: str) -> None:
    allowed = {name: getattr(ALL_RIGHTS, name) for name in ALL_RIGHTS.__slots__}
    problem = explain(err, 7, Privileges(**{**allowed, **privileges}))
    assert isinstance(problem, SourceUnavailable)
    with pytest.raises(SourceUnavailable, match=words):
        raise problem


def test_a_thread_that_has_ended_is_normal_life() -> None:
    assert isinstance(explain(OSError(errno.ESRCH, "x"), 7, ALL_RIGHTS), VmGone)
