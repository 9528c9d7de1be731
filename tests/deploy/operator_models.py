"""Judges manifests of the Prometheus Operator by models made of its CRDs: a list of JSON in, what is wrong out.

Run by an interpreter that has cloudcoil-models-prometheus-operator.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from cloudcoil.models.prometheus_operator import v1
from pydantic import ValidationError

MODELS = {"PodMonitor": v1.PodMonitor, "PrometheusRule": v1.PrometheusRule}


def find_unknown(given: object, known: object, path: str = "") -> Iterator[str]:
    """Paths of what was given and the model has dropped: models keep only what they know."""
    if isinstance(given, Mapping) and isinstance(known, Mapping):
        for key, value in given.items():
            if key in known:
                yield from find_unknown(value, known[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(given, list) and isinstance(known, list):
        for one, other in zip(given, known, strict=True):
            yield from find_unknown(one, other, f"{path}[]")


def judge(manifest: Mapping[str, Any]) -> list[str]:
    try:
        model = MODELS[manifest["kind"]].model_validate(manifest)
    except ValidationError as err:
        return [f"{manifest['kind']} {problem['loc']}: {problem['msg']}" for problem in err.errors()]
    kept = json.loads(model.model_dump_json(by_alias=True, exclude_unset=True))
    return [f"{manifest['kind']} {path} is not known" for path in find_unknown(manifest, kept)]


if __name__ == "__main__":
    print(json.dumps([problem for manifest in json.load(sys.stdin) for problem in judge(manifest)]))
