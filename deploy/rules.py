"""``python -m deploy.rules`` makes the PrometheusRules of deploy/kubernetes of grafana/alerts."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
ALERTS = ROOT / "grafana/alerts"
TARGET = ROOT / "deploy/kubernetes/base/prometheusrule.yaml"
HEAD = "# Made of grafana/alerts by `python -m deploy.rules`; the reasons for thresholds stand there.\n"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and lists below their names."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        del indentless
        super().increase_indent(flow, False)


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _write_text)


def make_rule(path: Path) -> dict[str, object]:
    """Make the PrometheusRule of a file of rules."""
    name = path.name.removesuffix(".rules.yml")
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "kvm-notify-exporter"}},
        "spec": yaml.safe_load(path.read_text()),
    }


def render_rules() -> str:
    """Render a document for each file of rules."""
    rules = [make_rule(path) for path in sorted(ALERTS.glob("*.rules.yml"))]
    return HEAD + yaml.dump_all(rules, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)


def main() -> int:
    """Write the file."""
    TARGET.write_text(render_rules())
    return 0


if __name__ == "__main__":
    sys.exit(main())
