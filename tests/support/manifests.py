"""The objects that the Helm chart and the kustomizations of ``deploy/`` render."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.requirements import require_program

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
NAMESPACE = "certmount"
Object = dict[str, Any]
Key = tuple[str, str, str]


class HelmError(AssertionError):
    """A helm command failed. The message is its output."""


def helm(*arguments: str, values: Mapping[str, object] | None = None, seconds: float = 60) -> str:
    """Run helm and return its output; ``values`` is passed as a file. Raises HelmError."""
    command = [require_program("helm"), *arguments, *([] if values is None else ["--values=-"])]
    text = None if values is None else json.dumps(values)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


def chart_objects(values: Mapping[str, object], *arguments: str, version: str = "1.34.0") -> dict[Key, Object]:
    """Render the chart for a version of Kubernetes."""
    flags = (f"--namespace={NAMESPACE}", f"--kube-version={version}", *arguments)
    return _by_key(helm("template", "certmount", str(CHART), *flags, values=values))


def kustomized_objects(directory: Path) -> dict[Key, Object]:
    """Render a kustomization."""
    command = [require_program("kustomize"), "build", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return _by_key(done.stdout)


def write_kustomization(directory: Path, **fields: object) -> Path:
    """Write a kustomization; paths in its fields are made relative, as kustomize requires."""

    def relative(value: object) -> object:
        if isinstance(value, Path):
            return os.path.relpath(value, directory.resolve())
        return [relative(item) for item in value] if isinstance(value, list) else value

    text: dict[str, object] = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    text |= {key: relative(value) for key, value in fields.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kustomization.yaml").write_text(json.dumps(text), encoding="utf-8")
    return directory


def _by_key(text: str) -> dict[Key, Object]:
    """Return the objects by kind, namespace and name, without what must differ."""
    found: dict[Key, Object] = {}
    for one in _normalized(text):
        metadata = one["metadata"]
        key = (one["kind"], metadata.get("namespace", ""), metadata["name"])
        assert key not in found, f"{key} is rendered twice"
        found[key] = one
    return found


def _normalized(text: str) -> Iterator[Object]:
    # Both tools append a hash of the content to this name, but not the same hash.
    text = re.sub(r"certmount-reload-[a-z0-9]{10}\b", "certmount-reload-hash", text)
    for one in yaml.safe_load_all(text):
        if one is None:
            continue
        one["metadata"].get("labels", {}).pop("helm.sh/chart", None)
        # Comments and the format of the files in ConfigMaps have no meaning.
        for name, content in (one.get("data") or {}).items() if one["kind"] == "ConfigMap" else ():
            if name.endswith(".yaml"):
                one["data"][name] = yaml.safe_load(content)
        yield one
