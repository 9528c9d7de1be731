"""The manifests: what Kubernetes and the Prometheus Operator accept, with the capabilities that the agent needs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.rules import ALERTS, TARGET, render_rules
from exporter.cli import parse_command_line
from exporter.flags import SOCKET_ADDRESS
from kvm.host.privileges import NEEDED_CAPABILITIES, Privileges
from tests.deploy.distributions import ROOT, make_environment
from tests.deploy.kubectl import render
from tests.deploy.unit_file import FULL, NO_ADMIN, read_values

KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = {"base": FULL, "kubevirt": FULL, "no-admin": NO_ADMIN}
OPERATORS = {"PodMonitor", "PrometheusRule"}
# From the first with securityContext.appArmorProfile on.
VERSIONS = ("1.30", "1.32", "1.34", "1.36")

Manifest = dict[str, Any]


@pytest.fixture(scope="module", params=sorted(OVERLAYS))
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def manifests(overlay: str) -> list[Manifest]:
    """What is applied, as kustomize makes it."""
    return [document for document in yaml.safe_load_all(render(KUBERNETES / overlay)) if document]


def find_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def find_pod(manifests: list[Manifest]) -> Manifest:
    (daemon_set,) = find_kind(manifests, "DaemonSet")
    pod: Manifest = daemon_set["spec"]["template"]["spec"]
    return pod


@pytest.mark.deploy
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_them(version: str, manifests: list[Manifest]) -> None:
    native = [manifest for manifest in manifests if manifest["kind"] not in OPERATORS]
    assert {manifest["kind"] for manifest in native} == {"Namespace", "DaemonSet", "ConfigMap"}
    for manifest in native:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.deploy
def test_a_field_that_kubernetes_does_not_know_is_noticed(manifests: list[Manifest]) -> None:
    (daemon_set,) = json.loads(json.dumps(find_kind(manifests, "DaemonSet")))
    daemon_set["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostPid"):
        kubernetes_validate.validate(daemon_set, VERSIONS[0], strict=True)


@pytest.fixture(scope="module")
def operator_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with models of the operator's CRDs: not that of the tests, as they bring a plugin for pytest."""
    return make_environment(tmp_path_factory.mktemp("operator") / "venv", "cloudcoil-models-prometheus-operator>=0.80")


def judge(python: Path, manifests: list[Manifest]) -> list[str]:
    """What is wrong with manifests of the operator's kinds."""
    program = [str(python), str(Path(__file__).with_name("operator_models.py"))]
    done = subprocess.run(program, input=json.dumps(manifests), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said: list[str] = json.loads(done.stdout)
    return said


@pytest.mark.deploy
@pytest.mark.slow
def test_the_operator_accepts_them(manifests: list[Manifest], operator_python: Path) -> None:
    found = [manifest for manifest in manifests if manifest["kind"] in OPERATORS]
    assert {manifest["kind"] for manifest in found} == OPERATORS
    assert judge(operator_python, found) == []

    # What it does not know, and what it misses, is noticed.
    (monitor,) = json.loads(json.dumps(find_kind(manifests, "PodMonitor")))
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    assert judge(operator_python, [monitor]) == ["PodMonitor .spec.podMetricsEndpoints[].intervall is not known"]
    del monitor["spec"]["selector"]
    assert any("selector" in said for said in judge(operator_python, [monitor]))


def test_the_rules_are_made_anew() -> None:
    assert TARGET.read_text() == render_rules(), "run: python -m deploy.rules"


@pytest.mark.deploy
def test_the_rules_are_those_of_grafana(manifests: list[Manifest]) -> None:
    files = {
        path.name.removesuffix(".rules.yml"): yaml.safe_load(path.read_text()) for path in ALERTS.glob("*.rules.yml")
    }
    assert len(files) == 3
    assert {rule["metadata"]["name"]: rule["spec"] for rule in find_kind(manifests, "PrometheusRule")} == files


@pytest.mark.deploy
def test_the_dashboards_are_those_of_grafana(manifests: list[Manifest]) -> None:
    maps = find_kind(manifests, "ConfigMap")
    assert {name: text for found in maps for name, text in found["data"].items()} == {
        path.name: path.read_text() for path in (ROOT / "grafana/dashboards").glob("*.json")
    }
    assert {found["metadata"]["labels"]["grafana_dashboard"] for found in maps} == {"1"}


@pytest.mark.deploy
def test_the_agent_has_the_capabilities_of_the_unit_and_no_others(overlay: str, manifests: list[Manifest]) -> None:
    (container,) = find_pod(manifests)["containers"]
    capabilities = container["securityContext"]["capabilities"]
    assert capabilities["drop"] == ["ALL"]
    added = {f"CAP_{name}" for name in capabilities["add"]}
    assert added == set(read_values(OVERLAYS[overlay], "CapabilityBoundingSet"))


def test_the_capabilities_are_those_of_the_features() -> None:
    demanding = replace(Privileges(uid=990), kvm_is_module=True, perf_event_paranoid=3)
    needed = {name for feature in demanding.find_features() for name in feature.needs}
    assert needed == set(NEEDED_CAPABILITIES) == set(read_values(FULL, "CapabilityBoundingSet"))
    modest = replace(Privileges(uid=990), kvm_is_module=False, perf_event_paranoid=2)
    needed = {name for feature in modest.find_features() for name in feature.needs}
    assert needed == set(read_values(NO_ADMIN, "CapabilityBoundingSet"))


@pytest.mark.deploy
def test_the_pod_sees_the_host_and_changes_nothing(manifests: list[Manifest]) -> None:
    pod = find_pod(manifests)
    (container,) = pod["containers"]
    assert pod["hostPID"] is True
    assert pod["automountServiceAccountToken"] is False
    context = container["securityContext"]
    assert (context["privileged"], context["allowPrivilegeEscalation"]) == (False, False)
    assert context["readOnlyRootFilesystem"] is True
    writable = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume} == {"socket"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.deploy
def test_flags_ports_and_paths_are_the_programs(manifests: list[Manifest]) -> None:
    (container,) = find_pod(manifests)["containers"]
    address, at_socket = parse_command_line(container["args"]).listen_addresses
    assert at_socket == SOCKET_ADDRESS, "where drill asks"
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "socket")
    assert Path(SOCKET_ADDRESS.path).parent == Path(mount["mountPath"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"metrics": address.port}
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("readiness", "liveness")]
    assert [(probe["path"], probe["port"]) for probe in probes] == [("/-/ready", "metrics"), ("/-/healthy", "metrics")]


@pytest.mark.deploy
def test_prometheus_finds_the_pods_and_knows_hosts_by_name(manifests: list[Manifest]) -> None:
    (monitor,) = find_kind(manifests, "PodMonitor")
    (daemon_set,) = find_kind(manifests, "DaemonSet")
    labels = daemon_set["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"] == daemon_set["spec"]["selector"] == {"matchLabels": labels}
    assert "kvm-notify" in labels[monitor["spec"]["jobLabel"]]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["relabelings"] == [{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "instance"}]


@pytest.mark.deploy
def test_an_overlay_of_ones_own_is_as_the_document_says(tmp_path: Path) -> None:
    """The example of docs/install.md, beside the others."""
    example = re.search(
        r"```yaml\n(# deploy/kubernetes/site/.*?)```", (ROOT / "docs/install.md").read_text(), re.DOTALL
    )
    assert example is not None
    shutil.copytree(ROOT / "deploy/kubernetes", tmp_path / "deploy/kubernetes")
    shutil.copytree(ROOT / "grafana", tmp_path / "grafana", ignore=shutil.ignore_patterns("__pycache__"))
    site = tmp_path / "deploy/kubernetes/site"
    site.mkdir()
    (site / "kustomization.yaml").write_text(example[1])
    manifests = [document for document in yaml.safe_load_all(render(site)) if document]
    (container,) = find_pod(manifests)["containers"]
    assert container["image"] == "registry.example.org/kvm-notify-exporter:0.1.0"


def test_the_image_is_made_of_the_package() -> None:
    lines = (ROOT / "deploy/Containerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
    assert copied == ["kvm-notify-exporter_*_amd64.deb"], "what `make packages` makes"
    assert f'ENTRYPOINT ["{read_values(FULL, "ExecStart")[0]}"]' in lines
