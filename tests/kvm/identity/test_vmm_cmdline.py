"""Command lines of VMMs, captured, documented and hostile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm.identity.vmm_cmdline import (
    CMDLINE_ARGUMENTS,
    LABEL_BYTES,
    clean_text,
    parse_arguments,
    parse_cloud_hypervisor_list,
    parse_cmdline,
    parse_qemu_list,
    parse_uuid,
)
from kvm.model import Owner

FIXTURES = Path(__file__).parents[2] / "fixtures" / "owners"
UUID = "6c1b3a86-60c5-4d0a-9b22-1d7c5d8f6a01"
JAILED = "551e7604-e35c-42b3-b825-416853441234"


@pytest.mark.parametrize(
    ("fixture", "owner"),
    [
        ("qemu", Owner("qemu", name="one,two", uuid=UUID)),
        ("libvirt", Owner("qemu", name="under_score", uuid=UUID)),
        ("libvirt-openstack", Owner("qemu", name="instance-0000002a", uuid=UUID)),
        ("proxmox", Owner("qemu", name="mail", uuid=UUID, own_id="104")),
        ("firecracker", Owner("firecracker", name="web-7", own_id="web-7")),
        ("firecracker-jailed", Owner("firecracker", name=JAILED, own_id=JAILED)),
        ("firecracker-default-id", Owner("firecracker")),
        ("cloud-hypervisor", Owner("cloud-hypervisor", uuid=UUID)),
        ("crosvm", Owner("crosvm", name="termina")),
    ],
)
def test_captured_command_lines(fixture: str, owner: Owner) -> None:
    directory = FIXTURES / fixture
    args = parse_arguments((directory / "cmdline").read_bytes())
    comm = (directory / "comm").read_text().strip()
    found = parse_cmdline(args, comm, (directory / "exe").read_text())
    assert replace(found, cpu_topology=None) == owner
    assert parse_cmdline(args, comm) == found


QEMU = "qemu-system-x86_64"


@pytest.mark.parametrize(
    ("args", "owner"),
    [
        ([QEMU, "-name", "plain"], Owner("qemu", name="plain")),
        ([QEMU, "--name", "plain"], Owner("qemu", name="plain")),
        ([QEMU, "-name", "a,,b=c,process=x"], Owner("qemu", name="a,b=c")),
        ([QEMU, "-name", "debug-threads=on"], Owner("qemu")),
        ([QEMU, "-name", "n", "-name", "debug-threads=on"], Owner("qemu", name="n")),
        ([QEMU, "-name", "n", "-name", "guest=m"], Owner("qemu", name="m")),
        ([QEMU, "-name", "-uuid", "-uuid", UUID], Owner("qemu", name="-uuid", uuid=UUID)),
        ([QEMU, "-name", "guest=,debug-threads=on"], Owner("qemu")),
        ([QEMU, "-name"], Owner("qemu")),
        ([QEMU, "-uuid", "00000000-0000-0000-0000-000000000000"], Owner("qemu")),
        ([QEMU, "-uuid", "not a uuid"], Owner("qemu")),
        ([QEMU, "-uuid", UUID.upper()], Owner("qemu", uuid=UUID)),
        ([QEMU, "-smbios", f"type=3,uuid={UUID}"], Owner("qemu")),
        ([QEMU, "-smbios", f"type=1,uuid={UUID}", "-smbios", "type=2,product=p"], Owner("qemu", uuid=UUID)),
        (["/usr/libexec/qemu-kvm", "-name", "n"], Owner("qemu", name="n")),
        (["kvm", "-name", "n"], Owner("qemu", name="n")),
        (["firecracker", "--id", "anonymous-instance"], Owner("firecracker")),
        (["firecracker", "--no-api", "--", "--id", "extra"], Owner("firecracker")),
        (["firecracker"], Owner("firecracker")),
        (["cloud-hypervisor", f"--platform=system_uuid={UUID}"], Owner("cloud-hypervisor", uuid=UUID)),
        (
            ["cloud-hypervisor", "--platform", f'oem_strings=["uuid=x","a,uuid=y"],uuid="{UUID}"'],
            Owner("cloud-hypervisor", uuid=UUID),
        ),
        (["cloud-hypervisor", "--platform", "num_pci_segments=2"], Owner("cloud-hypervisor")),
        (["crosvm", "--extended-status", "run", "--name=a b"], Owner("crosvm", name="a b")),
        (["crosvm", "run", "/vm_kernel"], Owner("crosvm")),
        ([], Owner("some-vmm")),
        (["/opt/vmm", "--name", "x", "--uuid", UUID], Owner("some-vmm")),
        (["qemu-img", "-name", "n"], Owner("some-vmm")),
    ],
)
def test_documented_and_odd_command_lines(args: list[str], owner: Owner) -> None:
    assert parse_cmdline(args, "some-vmm") == owner


def test_the_executable_counts_more_than_what_a_process_calls_itself() -> None:
    args = ["firecracker", "-name", "n", "--id", "i"]
    assert parse_cmdline(args, "crosvm", "/usr/bin/qemu-system-x86_64 (deleted)").vmm == "qemu"
    assert parse_cmdline(args, "crosvm", "/lib64/ld-linux-x86-64.so.2").vmm == "firecracker"
    assert parse_cmdline([], "cloud-hyperviso").vmm == "cloud-hypervisor"
    assert parse_cmdline([], "qemu-system-x86").vmm == "qemu"
    assert parse_cmdline([], "").vmm == "unknown"


def test_awkward_names_become_labels() -> None:
    def name(text: str) -> str:
        return parse_cmdline([QEMU, "-name", text.replace(",", ",,")], "").name

    assert name('say "hi" \\ back') == 'say "hi" \\ back'
    assert name("two\nlines\x1b[31m\x7f\x85") == "two\ufffdlines\ufffd[31m\ufffd\ufffd"
    assert name("right\u202eleft\u2066") == "right\ufffdleft\ufffd"
    assert name("x" * 65536) == "x" * (LABEL_BYTES - 3) + "…"
    assert name("x" * LABEL_BYTES) == "x" * LABEL_BYTES
    assert name("\U0001f600" * 300) == "\U0001f600" * ((LABEL_BYTES - 3) // 4) + "…"
    assert name("日本 👩‍💻") == "日本 👩‍💻"
    assert name("\udc80") == "\ufffd"


def test_arguments_end_with_nul_and_hold_any_bytes() -> None:
    assert parse_arguments(b"") == []
    assert parse_arguments(b"a\0\0b\0") == ["a", "", "b"]
    assert parse_arguments(b"a\0cut off") == ["a", "cut off"]
    assert parse_arguments(b"\xff\xc3\0") == ["\ufffd\ufffd"]
    assert parse_arguments(b"a\0" * CMDLINE_ARGUMENTS) == ["a"] * CMDLINE_ARGUMENTS
    assert parse_arguments(bytes(100_000)) == [""] * CMDLINE_ARGUMENTS


@pytest.mark.parametrize(
    ("text", "uuid"),
    [
        (UUID, UUID),
        (f"{{{UUID}}}", UUID),
        (f"urn:uuid:{UUID}", UUID),
        (UUID.replace("-", ""), UUID),
        ("6c1b3a86", ""),
        (UUID.replace("1", "_"), ""),
        (UUID.replace("1", "\u0661"), ""),
        (UUID + "0", ""),
        ("-" * 100_000, ""),
    ],
)
def test_uuids(text: str, uuid: str) -> None:
    assert parse_uuid(text) == uuid


@given(st.text())
def test_a_doubled_comma_is_a_comma(name: str) -> None:
    assert parse_qemu_list(f"guest={name.replace(',', ',,')},debug-threads=on", "guest") == {
        "guest": name,
        "debug-threads": "on",
    }


@given(st.text(st.characters(exclude_characters="=")))
def test_an_element_without_key_is_the_implied_one(name: str) -> None:
    assert parse_qemu_list(name.replace(",", ",,") + ",process=p", "guest") == {"guest": name, "process": "p"}


@given(st.text(alphabet=st.characters() | st.sampled_from(',=\x00"[]-')))
def test_any_list_is_parsed(text: str) -> None:
    for options in (parse_qemu_list(text, "guest"), parse_cloud_hypervisor_list(text)):
        assert sum(len(key) + len(value) for key, value in options.items()) <= len(text) + len("guest")


@given(st.text(), st.text())
def test_any_text_is_fit_for_a_label(text: str, more: str) -> None:
    cleaned = clean_text(text * 40 + more)
    assert len(cleaned.encode()) <= LABEL_BYTES
    assert clean_text(cleaned) == cleaned
    assert not set(cleaned) & set("\n\r\t\0\x1b\x7f\x9b\u2028\u202e")
    assert cleaned.encode().decode() == cleaned


WORD = st.sampled_from(
    [
        *"-name --name -uuid --id --id= --platform --platform= -smbios -- run -".split(),
        *f"guest=a,b uuid={UUID} {UUID} type=1,uuid=x ,,, = x \ufffd".split(),
    ]
)


@given(
    st.sampled_from([QEMU, "firecracker", "cloud-hypervisor", "crosvm", "other", ""]),
    st.lists(WORD | st.text(), max_size=12),
    st.text(max_size=20),
)
def test_any_command_line_gives_a_bounded_owner(program: str, args: list[str], comm: str) -> None:
    owner = parse_cmdline([program, *args], comm)
    assert owner.vmm
    for value in (owner.vmm, owner.name, owner.uuid, owner.own_id):
        assert value == clean_text(value)
    assert owner.uuid in ("", parse_uuid(owner.uuid))


@given(st.binary())
def test_any_bytes_are_arguments(raw: bytes) -> None:
    owner = parse_cmdline(parse_arguments(f"{QEMU}\0-name\0".encode() + raw), "")
    assert owner.name == clean_text(owner.name)


@pytest.mark.parametrize("piece", [",", "=", "[", '"', ",,", "a,", "[,", '",'])
def test_long_lists_take_no_longer_than_their_length(piece: str) -> None:
    """A quadratic parser would take minutes for these; the test's patience is pytest's."""
    text = piece * (1 << 19)
    parse_qemu_list(text, "guest")
    parse_cloud_hypervisor_list(text)


@pytest.mark.parametrize(
    ("text", "topology"),
    [
        ("3,maxcpus=9,sockets=3,cores=3,threads=1", (1, 3, 1)),
        ("cpus=8,maxcpus=8,sockets=2,dies=1,clusters=1,cores=2,threads=2", (1, 2, 2)),
        ("8,sockets=1,dies=2,cores=2,threads=2", (2, 2, 2)),
        ("8,sockets=2", (1, 4, 1)),
        ("8,sockets=2,cores=2", (1, 2, 2)),
        ("6,cores=3", (1, 3, 1)),
        ("6", None),  # QEMU before 6.2 makes sockets of them, and cores since
        ("6,threads=2", None),
        ("8,cores=2,clusters=2", None),
        ("8,cores=many", None),
        ("", None),
    ],
)
def test_topologies(text: str, topology: tuple[int, int, int] | None) -> None:
    found = parse_cmdline(["qemu-system-x86_64", "-smp", text], "qemu").cpu_topology
    assert found == topology
