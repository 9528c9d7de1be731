"""The dashboards that Grafana imports: built anew they are the same, they keep to the rules, links lead somewhere."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml

from exporter.prometheus.metrics import METRICS
from grafana.builder.__main__ import DASHBOARDS, main, render_files
from grafana.builder.colors import BAD
from grafana.builder.queries import select
from tests.grafana.dashboard_linter import LINTER_RULES, VALUES, Rule
from tests.grafana.dashboard_queries import Json, find_panels, find_queries, find_variables, read_dashboards, substitute
from tests.grafana.dashboard_rules import DECLARED, OWN_RULES, PROMETHEUS_OWN, RECORDED, find_labels_of
from tests.grafana.promql import find_labels, find_selectors
from tests.known_statistics import STATISTIC_METRICS

PROVISIONING = DASHBOARDS.parent / "provisioning"
FLEET, HOST, VM = "kvm-notify-fleet", "kvm-notify-host", "kvm-notify-vm"


@pytest.fixture(params=read_dashboards(), ids=lambda dashboard: dashboard["uid"])
def dashboard(request: pytest.FixtureRequest) -> Json:
    found: Json = copy.deepcopy(request.param)
    return found


def test_files_are_what_the_builder_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name: path.read_text() for path in DASHBOARDS.glob("*.json")} == render_files()
    assert main(["--check"]) == 0
    assert capsys.readouterr().out == ""


def test_builder_tells_what_it_would_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"], tmp_path) == 1
    assert list(tmp_path.iterdir()) == []
    assert main([], tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{uid}.json" for uid in (FLEET, HOST, VM)]
    assert main(["--check"], tmp_path) == 0
    assert main(["--chekc"], tmp_path) == 2
    assert "usage" in capsys.readouterr().err


def test_builder_refuses_a_label_that_a_metric_has_not() -> None:
    with pytest.raises(ValueError, match="kvm_host_vms has no label state"):
        select(DECLARED["kvm_host_vms"], state="armed")


@pytest.mark.parametrize("rule", LINTER_RULES + OWN_RULES, ids=lambda rule: rule.__name__)
def test_rule_has_no_complaint(rule: Rule, dashboard: Json) -> None:
    assert list(rule(dashboard)) == []


def test_dashboard_is_what_grafana_knows_it_by(dashboard: Json) -> None:
    assert dashboard["uid"] in {FLEET, HOST, VM}
    assert dashboard["title"].startswith("KVM notify exits: ")
    assert dashboard["tags"] == ["kvm", "kvm-notify"]
    # An id is that of one Grafana; an import with one would overwrite whatever has it there.
    assert "id" not in dashboard
    assert "__inputs" not in dashboard


OF_STALLED = {"kvm_vcpu_no_forward_progress", "kvm_vcpu_stall_start_timestamp_seconds", "kvm_vcpu_drill"}


def test_only_the_vm_dashboard_asks_for_every_vcpu() -> None:
    # Of stalled vCPUs there are few, of drills one, and --vcpu-series does not touch them. Other statistics are sums
    # over VMs unless somebody asks for more, and their row is collapsed.
    for query in find_queries():
        if query.dashboard != VM:
            metrics = {selector.metric for selector in find_selectors(query.expr)}
            assert {m for m in metrics - set(STATISTIC_METRICS) if m.startswith("kvm_vcpu_")} <= OF_STALLED, query


# What docs/fleet.md tells to keep on a central Prometheus.
CENTRAL = re.compile(
    r"instance:kvm_.+|kvm_host_.+|kvm_exporter_.+|kvm_vcpu_no_forward_progress|vm:kvm_vm_notify_window_exits:.+|up|vm:kvm_vm_info:notified"
    r"|kvm_vcpu_stall_start_timestamp_seconds|ALERTS|ALERTS_FOR_STATE"
)


def test_fleet_asks_for_what_a_central_prometheus_keeps() -> None:
    """Besides, for names of VMs (which may be missing) and VMs that are not read; never for a VM's counts."""
    for query in (query for query in find_queries() if query.dashboard == FLEET):
        others = {s.metric for s in find_selectors(query.expr) if not CENTRAL.fullmatch(s.metric)}
        assert others <= {"kvm_vm_info", "kvm_vm_source_info"}, query
        if others:
            assert query.instant, query
            assert not re.search(r"(kvm_vm_info|kvm_vm_source_info)\{[^}]*\}\[", query.expr), query


# What a panel may say when it has nothing to show.
NEUTRAL = (
    *("not known", "is known", "are known", "no VMs", "cannot be", "no such VM now"),
    *("not watched", "no series", "has been seen"),
)


def test_nothing_found_is_no_good_news(dashboard: Json) -> None:
    """Series that are not kept, not scraped or not recorded give no rows, too."""
    texts = {
        panel["fieldConfig"]["defaults"].get("noValue", ""): panel["title"]
        for panel in find_panels(dashboard)
        if not any(word in panel["fieldConfig"]["defaults"].get("noValue", "") for word in NEUTRAL)
    }
    assert texts == {}


def test_dashboard_is_made_of_what_grafana_10_knows(dashboard: Json) -> None:
    assert dashboard["schemaVersion"] == 38
    kinds = {"row", "stat", "table", "timeseries"} | ({"state-timeline"} if dashboard["uid"] != FLEET else set())
    assert {panel["type"] for panel in (*dashboard["panels"], *find_panels(dashboard))} == kinds
    for panel in find_panels(dashboard):
        instant = panel["type"] in {"stat", "table"}
        for target in panel["targets"]:
            assert (target["instant"], target["range"]) == (instant, not instant), panel["title"]
            assert target["format"] == ("table" if panel["type"] == "table" else "time_series"), panel["title"]
        if panel["type"] == "stat":
            assert panel["options"]["reduceOptions"]["calcs"] == ["lastNotNull"]


def test_stalled_is_red_and_its_words_are_not_swapped() -> None:
    found = {
        (mapping["options"]["1"]["text"], mapping["options"]["1"]["color"], mapping["options"]["0"]["text"])
        for panel in find_panels(next(d for d in read_dashboards() if d["uid"] == VM))
        for mapping in find_mappings(panel["fieldConfig"])
        if mapping["type"] == "value"
        if "stalled" in mapping["options"].get("0", {}).get("text", "")
        or "stalled" in mapping["options"].get("1", {}).get("text", "")
    }
    assert found == {("stalled", BAD, "not stalled")}
    for found_dashboard in read_dashboards():
        for panel in find_panels(found_dashboard):
            for mapping in find_mappings(panel["fieldConfig"]):
                if mapping["type"] != "value":
                    continue
                texts = {value: option["text"] for value, option in mapping["options"].items()}
                if set(texts) == {"0", "1"}:
                    assert (texts["0"], texts["1"]) in {
                        *(("no", "yes"), ("not stalled", "stalled"), ("does not work", "works"), ("down", "up")),
                    }, panel["title"]


def find_mappings(config: Json) -> list[Json]:
    mappings = list(config["defaults"].get("mappings", []))
    for override in config["overrides"]:
        mappings += [m for p in override["properties"] if p["id"] == "mappings" for m in p["value"]]
    return mappings


def test_fleet_draws_no_line_for_each_vm_or_host() -> None:
    panels = [panel for d in read_dashboards() if d["uid"] == FLEET for panel in find_panels(d)]
    for panel in panels:
        if panel["type"] == "table":
            continue
        for target in panel["targets"]:
            expr = substitute(target["expr"], VALUES)
            labels = find_labels(expr, find_labels_of)
            assert not labels & {"instance", "vm", "vcpu"} or "topk(10, " in expr, panel["title"]


def test_vm_is_known_by_its_label_alone() -> None:
    for query in find_queries(vm="SOME VM"):
        for selector in re.findall(r"kvm_(?:vm|vcpu)_\w+\{[^}]*\}", query.expr):
            if query.dashboard == VM and "variable" not in query.place:
                assert 'vm=~"SOME VM"' in selector, query


@pytest.mark.parametrize(
    ("name", "vm", "label"),
    [
        ("web-1", "6f1c3c52", "web-1 6f1c3c52"),
        ("", "qemu-17613", "qemu-17613"),
        ('",vm="other"} 1 0', "6f1c3c52", '",vm="other"} 1 0 6f1c3c52'),
    ],
)
def test_choice_of_vms_is_not_deceived_by_names(name: str, vm: str, label: str) -> None:
    (variable,) = (v for d in read_dashboards() for v in d["templating"]["list"] if v["name"] == "vm")
    regex = variable["regex"].removeprefix("/").removesuffix("/").replace("(?<", "(?P<")
    # How Grafana writes a line of query_result(): packages/grafana-prometheus/src/metric_find_query.ts
    match = re.search(regex, f'{{label="  {name} {vm}",vm="{vm}"}} 1 1795354030000')
    assert match
    assert (match["text"].strip(), match["value"]) == (label, vm)


def find_links(part: object) -> list[str]:
    """URLs of all data links and dashboard links in a part of a dashboard."""
    if isinstance(part, dict):
        own = [part["url"]] if isinstance(part.get("url"), str) else []
        return own + [url for inner in part.values() for url in find_links(inner)]
    return [url for inner in part for url in find_links(inner)] if isinstance(part, list) else []


# Where a row of alerts leads if it is about a host, or about a VM; `test_dashboard_reading` follows the other ones.
BOARDS = {"${__data.fields.host_board}": HOST, "${__data.fields.vm_board}": VM}


def test_links_lead_to_dashboards_with_their_variables() -> None:
    variables = {d["uid"]: {v["name"] for v in d["templating"]["list"]} for d in read_dashboards()}
    led = set()
    for found in read_dashboards():
        for url in find_links(found["panels"]):
            target = urlsplit(url)
            uid = BOARDS.get(target.path.removeprefix("/d/"), target.path.removeprefix("/d/"))
            passed = dict(parse_qsl(target.query))
            assert {name.removeprefix("var-") for name in passed if name.startswith("var-")} == variables[uid], url
            assert passed["var-datasource"] == "${datasource}"
            assert target.query.endswith("&${__url_time_range}")
            for name in variables[uid] - {"datasource"}:
                assert re.fullmatch(
                    rf"\$\{{__(data\.fields|field\.labels)\.{name}:percentencode\}}", passed[f"var-{name}"]
                )
            led.add((found["uid"], uid))
        for url in find_links(found["links"]):
            assert urlsplit(url).path.removeprefix("/d/") in variables
            led.add((found["uid"], urlsplit(url).path.removeprefix("/d/")))
    assert led == {(FLEET, HOST), (FLEET, VM), (HOST, HOST), (HOST, VM), (VM, HOST), (HOST, FLEET), (VM, FLEET)}


def test_links_find_their_values_where_they_stand() -> None:
    for found in read_dashboards():
        for panel in find_panels(found):
            wanted = set(re.findall(r"__(?:data\.fields|field\.labels)\.(\w+)", " ".join(find_links(panel))))
            given: set[str] = set()
            for target in panel["targets"]:
                given |= find_labels(substitute(target["expr"], VALUES), find_labels_of)
            assert wanted <= given, panel["title"]


def test_a_menu_leads_to_the_three_of_them(dashboard: Json) -> None:
    (menu,) = (link for link in dashboard["links"] if link["type"] == "dashboards")
    assert (menu["asDropdown"], menu["includeVars"], menu["keepTime"]) == (True, True, True)
    assert all(set(menu["tags"]) <= set(one["tags"]) for one in read_dashboards())


def test_rows_of_a_vm_repeat_with_its_name() -> None:
    """The value of the variable is an id; a UUID is no name."""
    vm = next(one for one in read_dashboards() if one["uid"] == VM)
    rows = [panel for panel in vm["panels"] if panel["type"] == "row"]
    assert {row["repeat"] for row in rows} == {"vm"}
    assert all("${vm:text}" in row["title"] and "$vm" not in row["title"] for row in rows)
    assert next(v for v in vm["templating"]["list"] if v["name"] == "vm")["multi"] is True


def test_what_is_seldom_needed_is_collapsed() -> None:
    found = {
        (one["uid"], row["title"].partition(" of ")[0])
        for one in read_dashboards()
        for row in one["panels"]
        if row["type"] == "row" and row["collapsed"]
    }
    rest = {(HOST, "Everything else KVM counts"), (VM, "Everything else KVM counts")}
    assert found == {(FLEET, "Agents"), (HOST, "Agent"), (HOST, "Tracing and warnings"), (VM, "Identity")} | rest


def test_panels_of_a_row_stand_in_it_only_if_it_is_collapsed(dashboard: Json) -> None:
    for row in dashboard["panels"]:
        if row["type"] == "row":
            assert bool(row["panels"]) == row["collapsed"], row["title"]


def test_prometheus_can_parse_every_expression(tmp_path: Path, tell: Callable[[str], None]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    queries = find_queries()
    named = [{"record": f"dashboards:query{i}", "expr": query.expr} for i, query in enumerate(queries)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": named}]}))
    run = subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    panels = sum(len(find_panels(d)) for d in read_dashboards())
    metrics = {selector.metric for query in queries for selector in find_selectors(query.expr)} & set(DECLARED)
    tell(
        f"dashboards: {len(read_dashboards())}, with {panels} panels and {len(queries)} expressions, which ask for "
        f"{len(metrics)} of {len(DECLARED)} metrics"
    )


def test_every_metric_is_on_a_dashboard() -> None:
    asked = {selector.metric for query in find_queries() for selector in find_selectors(query.expr)}
    assert asked - set(PROMETHEUS_OWN) - set(RECORDED) - set(STATISTIC_METRICS) == {metric.name for metric in METRICS}
    assert len(asked & set(STATISTIC_METRICS)) == 11, "those that explain why a guest is slow"


def test_provisioning_is_what_grafana_reads() -> None:
    (providers,) = (yaml.safe_load(path.read_text()) for path in (PROVISIONING / "dashboards").glob("*.yml"))
    (provider,) = providers["providers"]
    assert providers["apiVersion"] == 1
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).is_absolute()
    assert not provider["allowUiUpdates"]  # the files are the dashboards
    (sources,) = (yaml.safe_load(path.read_text()) for path in (PROVISIONING / "datasources").glob("*.yml"))
    assert sources["apiVersion"] == 1
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]


def test_variables_are_told_from_other_dollars() -> None:
    assert find_variables('rate(a{job=~"$job"}[$__rate_interval]) ${vm} ${vm:regex} "$1"') == {
        *("job", "vm", "__rate_interval"),
    }
    assert substitute('a{vm="${vm:regex}"} "$1"', {"vm": "x"}) == 'a{vm="x"} "$1"'
    with pytest.raises(KeyError):
        substitute("$nobody", {})
