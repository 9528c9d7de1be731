"""Our exposition against prometheus_client's: the same lines, and what its parsers read back."""

from __future__ import annotations

import gzip
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as ClientMetric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import CollectorRegistry

from exporter.prometheus.exposition import (
    PIECE_BYTES,
    CounterLines,
    Family,
    compress_document,
    cut_pieces,
    escape_label_value,
    make_template,
    open_self_metrics,
    render_document,
    render_metadata,
    render_number,
    render_same,
    render_sample,
    render_series,
    render_text,
)
from exporter.prometheus.metrics import METRICS, VCPU_EXITS, VCPU_STALL_START, VM_INFO, Metric, MetricType
from exporter.prometheus.negotiation import accepts_gzip, parse_accept

CLIENT_VERSION = tuple(int(part) for part in version("prometheus-client").split(".")[:2])
Samples = list[tuple[tuple[str, ...], float]]
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

words = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
label_names = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_]{0,8}", fullmatch=True)
# Half a surrogate pair is the one thing that we replace: prometheus_client raises on it.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
hostile_texts = st.one_of(texts, st.text(st.sampled_from('%ds\0\\\n\r"{},= #\t\x85\u2028é%('), max_size=12))
integers = st.integers(0, 2**64 - 1)
numbers = st.one_of(integers, st.floats())


@st.composite
def declared_metrics(draw: st.DrawFn, helps: st.SearchStrategy[str] = hostile_texts) -> Metric:
    kind = draw(st.sampled_from([MetricType.COUNTER, MetricType.GAUGE]))
    unit = draw(st.sampled_from(["", "seconds", "cycles"]))
    family = "_".join(["kvm", draw(words), *([unit] if unit else [])])
    name = f"{family}_total" if kind is MetricType.COUNTER else family
    labels = tuple(sorted(draw(st.sets(label_names, max_size=4))))
    return Metric(name, kind, draw(helps), labels, unit)


@st.composite
def families(
    draw: st.DrawFn, helps: st.SearchStrategy[str] = hostile_texts, values: st.SearchStrategy[float] = numbers
) -> tuple[Metric, Samples]:
    metric = draw(declared_metrics(helps))
    label_sets = draw(st.lists(st.tuples(*[hostile_texts] * len(metric.labels)), min_size=1, max_size=4, unique=True))
    return metric, [(label_values, draw(values)) for label_values in label_sets]


class Fixed:
    """What prometheus_client's encoders take: something to collect from."""

    def __init__(self, *families: ClientMetric) -> None:
        self._families = families

    def collect(self) -> Iterable[ClientMetric]:
        return self._families


def build_ours(metric: Metric, samples: Samples) -> Family:
    family = Family(metric)
    for label_values, value in samples:
        family.add(label_values, value)
    return family


def build_theirs(metric: Metric, samples: Samples) -> ClientMetric:
    maker: Callable[..., CounterMetricFamily | GaugeMetricFamily] = (
        CounterMetricFamily if metric.type is MetricType.COUNTER else GaugeMetricFamily
    )
    family = maker(metric.family, metric.help, labels=list(metric.labels), unit=metric.unit)
    for label_values, value in samples:
        family.add_metric(list(label_values), value)
    return family


def encode_theirs(*families: ClientMetric, accept: str = "") -> str:
    encoder, _ = choose_encoder(accept)
    return encoder(Fixed(*families)).decode()


def parse_back(document: str, openmetrics: bool) -> list[ClientMetric]:
    if openmetrics:
        return list(parse_openmetrics(document))  # type: ignore[no-untyped-call]
    return list(parse_text(document))


def assert_same_lines(ours: str, theirs: str) -> None:
    """Line for line the same bytes, but for the spelling of the number at the end of a sample line."""
    our_lines, their_lines = ours.split("\n"), theirs.split("\n")
    assert len(our_lines) == len(their_lines)
    for our_line, their_line in zip(our_lines, their_lines, strict=True):
        if our_line.startswith("#") or not our_line:
            assert our_line == their_line
            continue
        our_series, _, our_number = our_line.rpartition(" ")
        their_series, _, their_number = their_line.rpartition(" ")
        assert our_series == their_series
        assert float(our_number) == float(their_number) or math.isnan(float(our_number))


@given(families())
@settings(max_examples=300)
def test_text_is_prometheus_clients(family: tuple[Metric, Samples]) -> None:
    assert_same_lines(render_text([build_ours(*family)]), encode_theirs(build_theirs(*family)))


@given(families())
@settings(max_examples=300)
def test_openmetrics_is_prometheus_clients(family: tuple[Metric, Samples]) -> None:
    ours = render_text([build_ours(*family)], openmetrics=True) + "# EOF\n"
    assert_same_lines(ours, encode_theirs(build_theirs(*family), accept="application/openmetrics-text"))


@given(families(values=integers))
@settings(max_examples=200)
def test_templates_are_prometheus_clients(family: tuple[Metric, Samples]) -> None:
    metric, samples = family
    ours = Family(metric)
    lines, template = CounterLines(), make_template(metric, [label_values for label_values, _ in samples])
    for values in (tuple(0 for _ in samples), tuple(int(value) for _, value in samples)):
        ours.chunks = lines.render([template], [values])
    assert_same_lines(render_text([ours]), encode_theirs(build_theirs(metric, samples)))
    assert render_text([ours]) == render_text([build_ours(metric, samples)])


@given(families(helps=words, values=st.one_of(integers, st.floats(min_value=0, allow_nan=False))), st.booleans())
@settings(max_examples=300)
def test_parsers_read_back_what_was_meant(family: tuple[Metric, Samples], openmetrics: bool) -> None:
    metric, samples = family
    text = render_text([build_ours(*family)], openmetrics)
    parsed = parse_back(text + "# EOF\n" if openmetrics else text, openmetrics)
    assert [(found.name, found.type, found.documentation) for found in parsed] == [
        (metric.family, metric.type, metric.help)
    ]
    read_back = [(sample.name, sample.labels, float(sample.value)) for sample in parsed[0].samples]
    meant = [(metric.name, dict(zip(metric.labels, values, strict=True)), float(value)) for values, value in samples]
    assert read_back == meant


@given(st.text(st.characters(), max_size=30))
def test_any_label_value_is_readable(value: str) -> None:
    family = build_ours(VCPU_EXITS, [(("0", value), 1)])
    text = render_text([family]).encode().decode()
    (parsed,) = parse_text(text)
    expected = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in value)
    assert [sample.labels for sample in parsed.samples] == [{"vcpu": "0", "vm": expected}]


def test_undecodable_bytes_cost_nothing_else() -> None:
    name = b"web\xff%d".decode(errors="surrogateescape")
    assert escape_label_value(name) == "web\ufffd%d"
    (line,) = CounterLines().render([make_template(VCPU_EXITS, [("0", name)])], [(7,)])
    assert line.decode() == 'kvm_vcpu_exits_total{vcpu="0",vm="web\ufffd%d"} 7\n'


@pytest.mark.parametrize("value", [0, 1, 2**53 + 1, 2**63, 2**64 - 1])
def test_integers_keep_all_digits(value: int) -> None:
    (line,) = CounterLines().render([make_template(VCPU_EXITS, [("0", "a")])], [(value,)])
    assert line.decode() == f'kvm_vcpu_exits_total{{vcpu="0",vm="a"}} {value}\n'
    (parsed,) = parse_text(render_text([build_ours(VCPU_EXITS, [(("0", "a"), value)])]))
    assert float(parsed.samples[0].value) == float(value)


@pytest.mark.parametrize(
    ("value", "spelling"),
    [
        (0.5, "0.5"),
        (1_800_000_000.25, "1800000000.25"),
        (1e300, "1e+300"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
        (True, "1"),
    ],
)
def test_numbers_are_spelled_as_go_reads_them(value: float, spelling: str) -> None:
    assert render_number(value) == spelling


def test_template_wants_one_number_for_each_series() -> None:
    lines, template = CounterLines(), make_template(VCPU_EXITS, [("0", "a"), ("1", "a")])
    for values in ((1,), (1, 2, 3)):
        with pytest.raises(TypeError):
            lines.render([template], [values])
    with pytest.raises(ValueError, match="zip"):
        lines.render([template], [(1, 2), (3, 4)])
    assert lines.render([template], [(1, 2)])[0].count(b"\n") == 2


def test_what_comes_and_moves_is_rendered_and_what_stands_still_is_the_same_text() -> None:
    lines = CounterLines()
    one, other = (make_template(VCPU_EXITS, [("0", vm)]) for vm in "ab")
    assert lines.render([one], [(1,)]) == [make_line("a", 1)]
    both = lines.render([one, other], [(1,), (2,)])
    assert both == [make_line("a", 1), make_line("b", 2)]
    assert lines.render([one, other], [(1,), (2,)]) is both
    moved = lines.render([one, other], [(1,), (3,)])
    assert (moved, moved[0] is both[0]) == ([make_line("a", 1), make_line("b", 3)], True)
    assert both == [make_line("a", 1), make_line("b", 2)], "what was given away stays as it was"
    assert lines.render([other, one], [(1,), (2,)]) == [make_line("b", 1), make_line("a", 2)]
    assert lines.render([other], [(3,)]) == [make_line("b", 3)]


def make_line(vm: str, value: int) -> bytes:
    return f'kvm_vcpu_exits_total{{vcpu="0",vm="{vm}"}} {value}\n'.encode()


@pytest.mark.parametrize("seconds", [1_800_000_000.125, 1_800_000_000.0])
def test_a_time_keeps_its_fraction(seconds: float) -> None:
    (line,) = CounterLines().render([make_template(VCPU_STALL_START, [("0", "a")])], [(seconds,)])
    assert line.decode() == f'kvm_vcpu_stall_start_timestamp_seconds{{vcpu="0",vm="a"}} {seconds!r}\n'


def test_of_a_rendering_that_failed_nothing_is_left() -> None:
    lines = CounterLines()
    one, other = (make_template(VCPU_EXITS, [("0", vm)]) for vm in "ab")
    lines.render([one], [(0,)])
    with pytest.raises(TypeError):
        lines.render([other], [()])
    assert lines.refill([(1,)]) == [make_line("a", 1)]
    with pytest.raises(TypeError):
        lines.refill([()])
    assert lines.refill([(1,)]) == [make_line("a", 1)]
    assert lines.render([other], [(1,)]) == [make_line("b", 1)]


def test_series_wants_every_label() -> None:
    for label_values in ((), ("0",), ("0", "a", "b")):
        with pytest.raises(ValueError, match="zip"):
            render_series(VCPU_EXITS, label_values)


def test_empty_family_is_left_out() -> None:
    assert render_text([Family(VCPU_EXITS), build_ours(VM_INFO, [(tuple("abcdefghij"), 1)])]).startswith(
        "# HELP kvm_vm_info"
    )


def test_metadata_is_escaped() -> None:
    metric = Metric("kvm_a_seconds", MetricType.GAUGE, 'a "b"\\\n', (), "seconds")
    assert render_metadata(metric, False) == '# HELP kvm_a_seconds a "b"\\\\\\n\n# TYPE kvm_a_seconds gauge\n'
    assert render_metadata(metric, True) == (
        '# HELP kvm_a_seconds a \\"b\\"\\\\\\n\n# TYPE kvm_a_seconds gauge\n# UNIT kvm_a_seconds seconds\n'
    )


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("accept", ["", "application/openmetrics-text", "text/plain;version=1.0.0"])
def test_document_is_valid_with_and_without_self_metrics(accept: str, enabled: bool) -> None:
    form = parse_accept(accept)
    ours = [build_ours(VCPU_EXITS, [(("0", "a"), 3)])]
    document = b"".join(render_document(ours, open_self_metrics(enabled), form)).decode()
    parsed = parse_back(document, form.openmetrics)
    names = [family.name for family in parsed]
    assert names[0] == "kvm_vcpu_exits"
    assert ("process_resident_memory_bytes" in names) == enabled
    assert ("python_info" in names) == enabled
    assert len(set(names)) == len(names)
    assert not {metric.family for metric in METRICS} & set(names[1:])
    assert document.count("# EOF\n") == form.openmetrics
    assert document.endswith("# EOF\n" if form.openmetrics else "\n")


class BrokenCollector:
    def collect(self) -> Iterator[ClientMetric]:
        raise OSError("no /proc")


def test_broken_self_metrics_cost_themselves_only(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    registry.register(BrokenCollector())
    parts = render_document(
        [build_ours(VCPU_EXITS, [(("0", "a"), 3)])], registry, parse_accept("application/openmetrics-text")
    )
    document = b"".join(parts)
    assert b"kvm_vcpu_exits_total" in document
    assert document.endswith(b"\n# EOF\n")
    assert [record.levelname for record in caplog.records] == ["ERROR"]


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_PROTOBUF = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.7," + PROMETHEUS_3
)
TEXT_1 = "text/plain; version=1.0.0; charset=utf-8; escaping="


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", TEXT),
        ("application/json", TEXT),
        ("text/plain", TEXT),
        ("text/plain; version=0.0.4", TEXT),
        ("text/plain;version=1.0.0", TEXT_1 + "underscores"),
        ("text/plain;version=1.0.0;escaping=allow-utf-8", TEXT_1 + "allow-utf-8"),
        ("text/plain;version=1.0.0;escaping=dots", TEXT_1 + "underscores"),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0", OPENMETRICS + "; escaping=underscores"),
        ("application/openmetrics-text;version=0.0.1", TEXT),
        ("application/openmetrics-text;version=1.0.0;escaping=values", OPENMETRICS + "; escaping=underscores"),
        (PROMETHEUS_2, OPENMETRICS + "; escaping=underscores"),
        (PROMETHEUS_3, OPENMETRICS + "; escaping=allow-utf-8"),
        (PROMETHEUS_PROTOBUF, OPENMETRICS + "; escaping=allow-utf-8"),
        ("application/openmetrics-text;version=1.0.0;q=0.1,text/plain;q=0.9", TEXT),
        ("application/openmetrics-text;q=0", TEXT),
        ("application/openmetrics-text;version=99.0.0", TEXT),
        ("text/plain;version=a", TEXT),
        (";;;,,,=,;q=;version", TEXT),
        ("application/openmetrics-text;q=nan", TEXT),
    ],
)
def test_accept(accept: str, content_type: str) -> None:
    assert parse_accept(accept).content_type == content_type


@pytest.mark.skipif(CLIENT_VERSION < (0, 22), reason="this prometheus_client knows no text format 1.0.0")
@pytest.mark.parametrize("accept", ["", "*/*", PROMETHEUS_2, PROMETHEUS_3, PROMETHEUS_PROTOBUF, "text/plain"])
def test_accept_of_real_clients_is_prometheus_clients(accept: str) -> None:
    assert parse_accept(accept).content_type == choose_encoder(accept)[1]


@given(st.text(max_size=60))
def test_accept_survives_anything(header: str) -> None:
    assert parse_accept(header).content_type
    accepts_gzip(header)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [("gzip", True), ("deflate, GZIP;q=0.5", True), ("", False), ("identity", False), ("gzip;q=0", False)],
)
def test_gzip(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) == accepted
    assert gzip.decompress(b"".join(compress_document([b"a" * 100, b"b"]))) == b"a" * 100 + b"b"


@given(st.lists(st.binary(max_size=4).map(lambda part: part * (PIECE_BYTES // 3)), max_size=8))
def test_a_document_is_sent_in_pieces(parts: list[bytes]) -> None:
    pieces = [*cut_pieces(parts)]
    assert b"".join(pieces) == b"".join(parts)
    assert all(len(piece) <= PIECE_BYTES for piece in pieces)
    # No two in a row would have had room in one, but after a longer part, which is cut.
    longer = sum(len(part) > PIECE_BYTES for part in parts)
    assert len(pieces) <= 2 * sum(map(len, parts)) // PIECE_BYTES + 1 + 2 * longer
    assert gzip.decompress(b"".join(compress_document(parts))) == b"".join(parts)


@given(st.lists(hostile_texts, max_size=4), numbers)
def test_series_of_one_value_are_those_rendered_one_by_one(names: list[str], value: float) -> None:
    series = "".join(f"{render_series(VCPU_EXITS, ('0', name))}\n" for name in names).encode()
    assert render_same(series, value) == b"".join(render_sample(VCPU_EXITS, ("0", name), value) for name in names)


def fastest_seconds(action: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def test_templates_are_much_faster_than_prometheus_client() -> None:
    vms: Sequence[str] = [f"5107a7ed-0000-4000-8000-{number:012x}" for number in range(125)]
    lines = CounterLines()
    templates = [make_template(VCPU_EXITS, [(str(index), vm) for index in range(16)]) for vm in vms]
    looks = [[tuple(10**9 * vm + look + index for index in range(16)) for vm in range(len(vms))] for look in range(8)]
    next_look = itertools.cycle(looks)

    def render_ours() -> bytes:
        return render_text([Family(VCPU_EXITS, lines.render(templates, next(next_look)))]).encode()

    def render_theirs() -> bytes:
        family = CounterMetricFamily("kvm_vcpu_exits", VCPU_EXITS.help, labels=["vcpu", "vm"])
        for vm, column in zip(vms, looks[0], strict=True):
            for index, value in enumerate(column):
                family.add_metric([str(index), vm], value)
        return encode_theirs(family).encode()

    ratio = fastest_seconds(render_theirs, 3) / fastest_seconds(render_ours, 5)
    print(f"prometheus_client takes {ratio:.1f} times as long")
    assert ratio > 5
