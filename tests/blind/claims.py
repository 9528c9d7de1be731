"""Finds what the surfaces of one agent claim, and what a run as root beside it does not confirm.

To say that something is not known, or that VMs may be missing, is no claim. To leave a VM out and say nothing of it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import Metric

from tests.blind.surfaces import Answers

MAX_EXITS: Final = 2**53  # what a float holds exactly


@dataclass(frozen=True, slots=True)
class Truth:
    """What root reads of some VMs, by pid, in documents of ``once --format=json``: before and after all others.

    ``complete`` says whether it saw every VM of the host both times: strangers may have too many, or start one now.
    """

    before: Mapping[int, dict[str, Any]]
    after: Mapping[int, dict[str, Any]]
    host: dict[str, Any]
    sources: frozenset[str]
    complete: bool

    def find_exits(self, pid: int) -> tuple[dict[int, int], dict[int, int]]:
        """The exits of a VM's vCPUs by KVM's id, before and after."""
        before, after = (
            {vcpu["vcpu_id"]: vcpu["exits"] for vcpu in vms[pid]["vcpus"]} for vms in (self.before, self.after)
        )
        return before, after


def find_missing(truth: Truth, answers: Answers) -> set[int]:
    """The VMs that an agent does not list."""
    return set(truth.after) - {vm["pid"] for vm in answers.snapshot["vms"]}


def find_read(truth: Truth, answers: Answers) -> set[int]:
    """The VMs of which it has read a number."""
    return set(truth.after) & {vm["pid"] for vm in answers.snapshot["vms"] if vm["totals"]}


def claim_by_once(truth: Truth, answers: Answers) -> Iterator[str]:
    """What the table, the JSON document and the exit codes claim."""
    document, missing = answers.snapshot, find_missing(truth, answers)
    listed = {pid for pid in truth.after if re.search(rf"\b{pid}\b", answers.once.text)}
    if answers.once.text == "no VM found\n" and truth.after:
        yield "the table says that there is no VM"
    if answers.once.code == 0 and set(truth.after) - listed:
        yield "exit code 0 with VMs left out of the table"
    if missing and (document["complete"] or answers.once_json.code == 0):
        yield f"the document is complete without {len(missing)} VMs"
    if not find_read(truth, answers) and answers.once_json.code == 0:
        yield "exit code 0, and nothing was read"
    for vm in document["vms"]:
        if vm["pid"] in truth.after:
            yield from claim_of_a_vm(truth, vm)
    yield from claim_of_the_host(truth, document["host"])
    for source in document["sources"]:
        if source["up"] and source["source"] not in truth.sources:
            yield f"{source['source']} works, for root it does not"


def claim_of_a_vm(truth: Truth, vm: dict[str, Any]) -> Iterator[str]:
    known, (before, after) = truth.after[vm["pid"]], truth.find_exits(vm["pid"])
    for vcpu in vm["vcpus"]:
        exits = vcpu.get("exits")
        if exits is not None and not before[vcpu["vcpu_id"]] <= exits <= after[vcpu["vcpu_id"]]:
            yield f"{exits} exits of a vCPU that has {after[vcpu['vcpu_id']]}"
    total = vm["totals"].get("exits")
    if total is not None and not sum(before.values()) <= total <= sum(after.values()):
        yield f"{total} exits of a VM that has {sum(after.values())}"
    if vm["vcpu_count"] not in (None, known["vcpu_count"]):
        yield f"{vm['vcpu_count']} vCPUs of {known['vcpu_count']}"
    if vm["protection"] not in ("unknown", known["protection"]):
        yield f"protection {vm['protection']}, for root it is {known['protection']}"


def claim_of_the_host(truth: Truth, host: Mapping[str, Any]) -> Iterator[str]:
    for name in ("notify_supported", "cpu_vendor", "microcode", "lockdown", "kvm_module"):
        if name in host and host[name] not in (None, "", truth.host[name]):
            yield f"{name} is {host[name]}, for root it is {truth.host[name]}"


def claim_by_check(truth: Truth, answers: Answers) -> Iterator[str]:
    """What ``check`` claims."""
    lines = dict(line.split(maxsplit=1) for line in answers.check.text.splitlines() if not line.startswith("source"))
    missing, read = find_missing(truth, answers), find_read(truth, answers)
    if (missing or not read) and answers.check.code == 0:
        yield "exit code 0"
    if lines["VMs"] == "none runs" and truth.after:
        yield "no VM runs"
    if missing and lines["complete"] == "every VM of this host is seen":
        yield "every VM is seen"
    if set(truth.after) - read and lines["verdict"] == "the counters of this host can be read":
        yield "all counters can be read"
    if lines["stalls"].startswith("can be told") and answers.api["problem"]:
        yield f"stalls can be told, and serve cannot tell them: {answers.api['problem']}"


def claim_by_metrics(truth: Truth, answers: Answers) -> Iterator[str]:
    """What /metrics claims."""
    families = answers.families

    def ask(name: str, label: str = "") -> dict[str, float]:
        samples = families[name].samples if name in families else []
        return {sample.labels.get(label, ""): sample.value for sample in samples}

    pids = {sample.labels["vm"]: int(sample.labels["pid"]) for sample in find_samples(families, "kvm_vm_info")}
    missing = set(truth.after) - set(pids.values())
    if missing and ask("kvm_exporter_complete") != {"": 0.0}:
        yield f"kvm_exporter_complete is not 0 without {len(missing)} VMs"
    if missing and not ask("kvm_exporter_incomplete_reason_info", "reason"):
        yield "it is incomplete for no reason"
    if "kvm_host_vms" in families and sum(ask("kvm_host_vms", "protection").values()) < len(truth.after):
        yield "kvm_host_vms counts too few"
    yield from claim_by_exits(truth, families, pids)
    for vm, count in ask("kvm_vm_vcpus", "vm").items():
        if pids.get(vm) in truth.after and count != truth.after[pids[vm]]["vcpu_count"]:
            yield f"{count} vCPUs of a VM"
    for sample in find_samples(families, "kvm_host_info"):
        yield from claim_of_the_host(truth, sample.labels)
        if not all(sample.labels[name] for name in ("cpu_vendor", "cpu_model", "kernel")):
            yield "kvm_host_info with empty labels"
    for source, up in ask("kvm_exporter_source_up", "source").items():
        if up and source not in truth.sources:
            yield f"{source} is up, for root it is not"
    if "kvm_host_notify_window_exits" in families and not set(pids.values()) & set(truth.after):
        yield "a sum of notify exits, and no VM was seen"


def claim_by_exits(truth: Truth, families: Mapping[str, Metric], pids: Mapping[str, int]) -> Iterator[str]:
    for sample in find_samples(families, "kvm_vcpu_exits"):
        pid = pids.get(sample.labels["vm"])
        if pid is not None and pid in truth.after:
            before, after = truth.find_exits(pid)
            low, high = min(before.values()), max(after.values())
            if not low <= sample.value <= min(high, MAX_EXITS):
                yield f"{sample.value} exits of a vCPU"


def find_samples(families: Mapping[str, Metric], name: str) -> list[Any]:
    return list(families[name].samples) if name in families else []


def find_listed(truth: Truth, answers: Answers) -> set[int]:
    """The VMs that serve lists: it may see others than once did."""
    return set(truth.after) & {int(sample.labels["pid"]) for sample in find_samples(answers.families, "kvm_vm_info")}


def find_served(truth: Truth, answers: Answers) -> set[int]:
    """The VMs of which serve has read a number."""
    sources = {sample.labels["vm"] for sample in find_samples(answers.families, "kvm_vm_source_info")}
    infos = find_samples(answers.families, "kvm_vm_info")
    return set(truth.after) & {int(sample.labels["pid"]) for sample in infos if sample.labels["vm"] in sources}


def claim_by_ready(truth: Truth, answers: Answers) -> Iterator[str]:
    """What /-/ready claims."""
    status, text = answers.ready
    if status == 200 and not find_served(truth, answers):
        yield "ready, and nothing is read"
    if status == 503 and text.rstrip().endswith(":"):
        yield "not ready for no reason"


def claim_by_page(truth: Truth, answers: Answers) -> Iterator[str]:
    """What the status page claims; one that was refused claims nothing."""
    found = re.search(r'headline is-(\w+)".*?id="headline">(.*?)</h2></div><p>(.*?)</p>', answers.page, re.DOTALL)
    if found is None:
        assert "<html" not in answers.page, "the page has no headline"
        return
    level, headline, meaning = found.groups()
    everybody = set(truth.after)
    if everybody != find_served(truth, answers):
        if level == "calm":
            yield f"calm: {headline}"
        if "of this host has" in headline and everybody != find_listed(truth, answers):
            yield headline
    if "There is no VM." in meaning and truth.after:
        yield "there is no VM"


def claim_by_api(truth: Truth, answers: Answers) -> Iterator[str]:
    """What /api/v1/vcpus claims: an empty list says that nobody takes notify exits."""
    if set(truth.after) - find_listed(truth, answers) and answers.api.get("complete") is not False:
        yield "the list is complete"
    if set(truth.after) != find_served(truth, answers) and not (
        answers.api.get("incomplete_reasons") or answers.api.get("unread_vms")
    ):
        yield "every VM is read"


def claim_by_log(truth: Truth, answers: Answers) -> Iterator[str]:
    """What the log claims by saying nothing at level WARN."""
    warnings = [line for line in answers.log if "level=WARN" in line]
    if set(truth.after) - find_listed(truth, answers) and not any("may not be seen" in line for line in warnings):
        yield "no line says that VMs may be missing"
    if any("every VM of this host is seen" in line for line in answers.log[-1:]):
        yield from ["every VM is seen"] * bool(set(truth.after) - find_listed(truth, answers))
    # Not a line for each: there is a budget of lines, and strangers may have many such VMs.
    unread = find_listed(truth, answers) - find_served(truth, answers)
    if unread and not any("no source can read the VM" in line for line in warnings):
        yield "no line says that VMs are not read"


SURFACES: Final[dict[str, Callable[[Truth, Answers], Iterator[str]]]] = {
    "once": claim_by_once,
    "check": claim_by_check,
    "/metrics": claim_by_metrics,
    "/-/ready": claim_by_ready,
    "page": claim_by_page,
    "API": claim_by_api,
    "log": claim_by_log,
}
