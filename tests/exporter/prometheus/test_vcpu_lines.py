"""The lines of one metric for a VM's vCPUs: whatever changes, they are those of the values given last."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exporter.prometheus import metrics
from exporter.prometheus.vcpu_lines import BLOCK, VcpuLines

METRIC = metrics.VCPU_DRILL
VCPUS = 2 * BLOCK + 1  # two blocks and a part
VALUES = st.one_of(st.none(), st.integers(0, 2**64 - 1), st.sampled_from([0.5, 1.7e9, 1_700_000_000.125]))
PLACES = st.sampled_from([0, 1, BLOCK - 1, BLOCK, VCPUS - 1])
COLUMNS = st.builds(lambda some: [some.get(at) for at in range(VCPUS)], st.dictionaries(PLACES, VALUES))


@given(st.lists(COLUMNS, max_size=8))
def test_the_lines_are_those_of_the_last_values(changes: list[list[float | None]]) -> None:
    lines = VcpuLines(METRIC, [b'{vcpu="%d"}' % at for at in range(VCPUS)])
    assert lines.render() == []
    for values in changes:
        lines.put(values)
        expected = [f'{METRIC.name}{{vcpu="{at}"}} {value!r}\n' for at, value in enumerate(values) if value is not None]
        assert render(lines) == "".join(expected)


def render(lines: VcpuLines) -> str:
    rendered = lines.render()
    assert all(rendered)
    return b"".join(rendered).decode()


def test_a_block_that_has_not_changed_is_the_same_text() -> None:
    lines = VcpuLines(METRIC, [b'{vm="100%"}'] * VCPUS)
    lines.put([1] * VCPUS)
    before = lines.render()
    lines.put([2 if at == BLOCK else 1 for at in range(VCPUS)])
    now = lines.render()
    assert [text is old for text, old in zip(now, before, strict=True)] == [True, False, True]
    assert now[1].startswith(b'kvm_vcpu_drill{vm="100%"} 2\nkvm_vcpu_drill{vm="100%"} 1\n')
