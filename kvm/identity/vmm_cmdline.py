"""Understands the command lines of VMMs: which program runs, and what its VM is called.

Pure: text in, Owner out. Everything here is untrusted text, chosen by whoever starts VMs. Decisions:

* A value becomes fit for a label, a log line and a terminal (``clean_text``): what is not UTF-8 or not printable is
  U+FFFD, and at most 128 bytes of UTF-8 stay: Prometheus' ``label_value_length_limit`` counts bytes, 200 is a usual
  limit, and one value over it costs the whole scrape. Quotes and backslashes stay: escaping belongs to the exposition.
* The program is told by the name of its executable, which the kernel vouches for; where that is an interpreter, a
  loader or unreadable, by its first argument, and then by its process name.
* An identity is only what was given on purpose. Firecracker's ``anonymous-instance`` and QEMU's UUID of zeros are what
  these programs use when nothing was given, so they are no identities.
* A name and an id are told apart: ``own_id`` is what the VMM itself keeps unique for its users (Firecracker's ``--id``,
  which is its VM's only name as well; Proxmox's ``-id``).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence

from kvm.model import CpuTopology, Owner

LABEL_BYTES = 128
CMDLINE_ARGUMENTS = 8192

# C0 and C1 controls and DEL, line and paragraph separators, bidirectional controls (they make a name read as another),
# lone surrogates (no UTF-8 can hold them).
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# A process name is cut to 15 bytes: `qemu-system-x86_64` shows as `qemu-system-x86`, `cloud-hypervisor` loses its end.
_PROGRAMS = (
    ("qemu", re.compile(r"qemu-system-[A-Za-z0-9_]+|qemu-kvm|kvm")),
    ("firecracker", re.compile(r"firecracker(?:[-_.].*)?")),
    ("cloud-hypervisor", re.compile(r"cloud-hypervis(?:o|or(?:[-_.].*)?)")),
    ("crosvm", re.compile(r"crosvm(?:[-_.].*)?")),
)
_FIRECRACKER_DEFAULT_ID = "anonymous-instance"  # src/vmm/src/vmm_config/instance_info.rs and main.rs of Firecracker

# One element of QEMU's option lists (util/qemu-option.c, opts_do_parse): a comma in a value is written twice.
_QEMU_ELEMENT = re.compile(r"(?:([^=,]*)=)?([^,]*(?:,,[^,]*)*)(?:,|$)")


def clean_text(text: str) -> str:
    """Return untrusted text as a label value: printable, at most 128 bytes of UTF-8, with "…" where it was cut."""
    text = _UNFIT.sub("\ufffd", text[: LABEL_BYTES + 1])
    encoded = text.encode()
    if len(encoded) <= LABEL_BYTES:
        return text
    return encoded[: LABEL_BYTES - len("…".encode())].decode(errors="ignore") + "…"


def parse_uuid(text: str) -> str:
    """Return a UUID in its usual spelling, "" where the text is none or is the UUID of zeros."""
    if len(text) > len("urn:uuid:") + 38:
        return ""
    digits = text.strip().lower().removeprefix("urn:uuid:").strip("{}").replace("-", "")
    if re.fullmatch(r"[0-9a-f]{32}", digits) is None or not digits.strip("0"):
        return ""
    return str(uuid.UUID(digits))


def parse_arguments(raw: bytes) -> list[str]:
    """Return the arguments in a /proc/PID/cmdline, NUL after each; those past the 8192nd are left out."""
    arguments = raw.decode("utf-8", "replace").split("\0", CMDLINE_ARGUMENTS)
    return arguments[:-1] if len(arguments) > CMDLINE_ARGUMENTS or not arguments[-1] else arguments


def parse_qemu_list(text: str, implied: str) -> dict[str, str]:
    """Return the keys and values of a QEMU option list; a first element without a key belongs to ``implied``."""
    options = {}
    for position, match in enumerate(_QEMU_ELEMENT.finditer(text)):
        key, value = match[1], match[2].replace(",,", ",")
        if key is not None:
            options[key] = value
        elif position == 0:
            options[implied] = value
    return options


def parse_smp(text: str) -> CpuTopology | None:
    """Return the topology that QEMU's ``-smp`` asks for; None where it does not tell how many cores a die has.

    QEMU fills in what is left out (machine_parse_smp_config() in hw/core/machine-smp.c): threads and dies are 1, and
    cores follow from maxcpus where sockets are given. Without both, its versions differ.
    """
    options = parse_qemu_list(text, "cpus")
    numbers = {key: int(value) for key, value in options.items() if re.fullmatch(r"[1-9]\d{0,4}", value, re.ASCII)}
    if len(numbers) != len(options) or any(numbers.get(level, 1) != 1 for level in ("modules", "clusters")):
        return None
    dies, threads, cores = numbers.get("dies", 1), numbers.get("threads", 1), numbers.get("cores", 0)
    cpus = numbers.get("maxcpus") or numbers.get("cpus", 0)
    if "threads" not in numbers and cores and "sockets" in numbers:
        threads = max(1, cpus // (numbers["sockets"] * dies * cores))
    if not cores and "sockets" in numbers:
        cores = cpus // (numbers["sockets"] * dies * threads)
    return CpuTopology(dies, cores, threads) if cores else None


def parse_cloud_hypervisor_list(text: str) -> dict[str, str]:
    """Return the keys and values of a cloud-hypervisor option list; quotes and brackets may hold commas."""
    elements: list[list[str]] = [[]]
    is_quoted = False
    depth = 0
    for part in re.split(r'([,"\[\]])', text):
        is_quoted ^= part == '"'
        if not is_quoted:
            depth += (part == "[") - (part == "]")
        if part == "," and not is_quoted and depth <= 0:
            elements.append([])
        elif part != '"':
            elements[-1].append(part)
    return dict("".join(element).partition("=")[::2] for element in elements)


def parse_cmdline(args: Sequence[str], comm: str, executable: str = "") -> Owner:
    """Return what a VMM's arguments tell about its VM; of an unknown program only its process name.

    ``args`` are the arguments, the program's own name first; ``comm`` is the process name, ``executable`` the path of
    the program. Raises nothing: what makes no sense is left out.
    """
    vmm = _name_vmm(executable, args[0] if args else "", comm)
    match vmm:
        case "qemu":
            return _parse_qemu(args)
        case "firecracker":
            return _parse_firecracker(args)
        case "cloud-hypervisor":
            return _parse_cloud_hypervisor(args)
        case "crosvm":
            return _parse_crosvm(args)
    return Owner(vmm=clean_text(comm) or "unknown")


def _name_vmm(*programs: str) -> str:
    for program in programs:
        name = program.removesuffix(" (deleted)").rpartition("/")[2]
        for vmm, pattern in _PROGRAMS:
            if pattern.fullmatch(name):
                return vmm
    return ""


def _find_options(args: Sequence[str], *names: str) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of these long options: ``--name value``, ``--name=value``, QEMU's ``-name value`` too."""
    following = iter(args[1:])
    for argument in following:
        if argument == "--":  # what follows is for the guest, or for a program that is started
            return
        if not argument.startswith("-"):
            continue
        name, equals, value = argument.removeprefix("-").removeprefix("-").partition("=")
        if name not in names:
            continue
        if equals:
            yield name, value
        elif (following_value := next(following, None)) is not None:
            yield name, following_value


def _parse_qemu(args: Sequence[str]) -> Owner:
    name = own_id = given_uuid = smbios_uuid = ""
    topology = None
    for option, value in _find_options(args, "name", "uuid", "id", "smbios", "smp"):
        match option:
            case "smp":
                topology = parse_smp(value)
            case "name":  # several -name add up (merge_lists in softmmu/vl.c), the last guest= wins
                name = parse_qemu_list(value, "guest").get("guest", name)
            case "uuid":
                given_uuid = parse_uuid(value)
            case "id":  # Proxmox VE's QEMU: the number of the VM there
                own_id = value
            case "smbios":  # Proxmox VE and others give the UUID to the guest's firmware only
                table = parse_qemu_list(value, "type")
                smbios_uuid = parse_uuid(table.get("uuid", "")) if table.get("type") == "1" else smbios_uuid
    return Owner(
        vmm="qemu",
        name=clean_text(name),
        uuid=given_uuid or smbios_uuid,
        own_id=clean_text(own_id),
        cpu_topology=topology,
    )


def _parse_firecracker(args: Sequence[str]) -> Owner:
    given = dict(_find_options(args, "id")).get("id", "")
    own_id = "" if given == _FIRECRACKER_DEFAULT_ID else clean_text(given)
    return Owner(vmm="firecracker", name=own_id, own_id=own_id)


def _parse_cloud_hypervisor(args: Sequence[str]) -> Owner:
    platform = dict(_find_options(args, "platform")).get("platform", "")
    options = parse_cloud_hypervisor_list(platform)
    given = options.get("system_uuid") or options.get("uuid", "")
    return Owner(vmm="cloud-hypervisor", uuid=parse_uuid(given))


def _parse_crosvm(args: Sequence[str]) -> Owner:
    return Owner(vmm="crosvm", name=clean_text(dict(_find_options(args, "name")).get("name", "")))
