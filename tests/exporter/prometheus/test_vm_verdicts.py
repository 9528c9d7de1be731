"""The kept lines about one VM's vCPUs: looked at are those that have changed, and nothing half done is kept."""

from __future__ import annotations

import pytest

from exporter.prometheus import metrics
from exporter.prometheus.metrics import Metric
from exporter.prometheus.vcpu_lines import VcpuLines
from exporter.prometheus.vm_verdicts import Known, VmVerdicts
from exporter.stalls.verdicts import State, VcpuFigures, VmFigures
from kvm.model import Vcpu

VCPUS = [Vcpu(index, 2 * index, 5000 + index) for index in range(3)]
KNOWN = Known(
    traced=True, judged=True, notified=range(3), missed=(), drilled=(), starts={}, invalid=None, is_alone=True
)

DRILLED = KNOWN._replace(drilled={0})


def open_lines(metric: Metric) -> VcpuLines:
    return VcpuLines(metric, [b'{vcpu="%d"}' % vcpu.index for vcpu in VCPUS])


def make_figures(traced: int) -> VcpuFigures:
    return VcpuFigures(State.PROGRESSING, None, traced, 0, can_judge=True)


def find_traced(rendered: list[tuple[Metric, bytes]]) -> list[str]:
    (text,) = (text for metric, text in rendered if metric is metrics.VCPU_TRACED_EXITS)
    return [line.split()[-1] for line in text.decode().splitlines()]


def count_puts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions at which values are put in from now on."""
    puts: list[int] = []
    put = VcpuLines.put

    def note(lines: VcpuLines, at: int, value: float | None) -> None:
        puts.append(at)
        put(lines, at, value)

    monkeypatch.setattr(VcpuLines, "put", note)
    return puts


def test_only_vcpus_that_have_changed_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = VmVerdicts(VCPUS, open_lines)
    first = VmFigures({2 * at: make_figures(at) for at in range(3)}, 0)
    rendered = verdicts.render(KNOWN, first)
    assert find_traced(rendered) == ["0", "1", "2"]
    assert verdicts.render(KNOWN, first) is rendered
    puts = count_puts(monkeypatch)
    assert find_traced(verdicts.render(KNOWN, VmFigures({**first.vcpus, 2: make_figures(9)}, 0))) == ["0", "9", "2"]
    assert set(puts) == {1}


def test_a_metric_of_which_nothing_is_told_has_no_lines() -> None:
    opened = []

    def note(metric: Metric) -> VcpuLines:
        opened.append(metric)
        return open_lines(metric)

    assert VmVerdicts(VCPUS, note).render(KNOWN._replace(judged=False), VmFigures({}, 0)) == []
    assert opened == []


@pytest.mark.parametrize(("fails", "calls"), [("_render", 0), ("_render", 1), ("render", 0)])
@pytest.mark.parametrize("next_known", [KNOWN, DRILLED], ids=["as before", "drilled"])
def test_of_what_failed_half_way_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, fails: str, calls: int, next_known: Known
) -> None:
    works, made = getattr(VcpuLines, fails), []

    def fail(*arguments: object) -> object:
        made.append(arguments)
        if len(made) > calls:
            raise MemoryError
        return works(*arguments)

    verdicts = VmVerdicts(VCPUS, open_lines)
    verdicts.render(KNOWN, VmFigures({0: make_figures(1)}, 0))
    figures = VmFigures({0: make_figures(2)}, 0)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(VcpuLines, fails, fail)
        verdicts.render(DRILLED, figures)
    made_anew = dict(VmVerdicts(VCPUS, open_lines).render(next_known, figures))
    assert dict(verdicts.render(next_known, figures)) == made_anew != {}
