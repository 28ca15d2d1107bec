"""The software bill of materials of ``make sbom``."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from csi_driver import __version__
from tests.support.requirements import missing

ROOT = Path(__file__).parents[2]
ENGINE = """#!/bin/sh
[ "$1" = image ] || printf 'zlib1g 1:1.3.dfsg+really1.3.1-1+b1 amd64\\nlibc6 2.41-12 amd64\\n'
"""


def write(directory: Path, image: str) -> str:
    """Run scripts/sbom with a container engine that knows one image."""
    if importlib.util.find_spec("cyclonedx_py") is None:
        missing("needs the packages of requirements-supply-chain.lock; run: make venv")
    engine = directory / "bin" / "docker"
    engine.parent.mkdir(exist_ok=True)
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    output = directory / "sbom.json"
    environment = os.environ | {"IMAGE": image, "PATH": f"{engine.parent}:{os.environ['PATH']}"}
    subprocess.run([ROOT / "scripts/sbom", output], env=environment, check=True, capture_output=True, cwd=directory)
    return output.read_text()


def test_each_locked_package_has_its_version_and_hashes(tmp_path: Path) -> None:
    text = write(tmp_path, "localhost/certmount:dev")
    assert write(tmp_path, "localhost/certmount:dev") == text
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom: dict[str, Any] = json.loads(text)
    assert (bom["metadata"]["component"]["name"], bom["metadata"]["component"]["version"]) == ("certmount", __version__)
    found = {
        (one["name"], one["version"]): {
            entry["content"] for reference in one["externalReferences"] for entry in reference.get("hashes", [])
        }
        for one in bom["components"]
        if one["purl"].startswith("pkg:pypi/")
    }
    lock = (ROOT / "requirements.lock").read_text()
    locked = {
        (match[1], match[2]): set(re.findall(r"--hash=sha256:([0-9a-f]{64})", match[3]))
        for match in re.finditer(r"^([a-z0-9._-]+)==([^ ]+)(.*\n(?: .*\n)*)", lock, flags=re.MULTILINE)
    }
    assert len(locked) > 30
    assert found == locked
    debian = [(one["name"], one["version"], one["purl"]) for one in bom["components"] if "pkg:deb/" in one["purl"]]
    assert debian == [
        ("libc6", "2.41-12", "pkg:deb/debian/libc6@2.41-12?arch=amd64"),
        ("zlib1g", "1:1.3.dfsg+really1.3.1-1+b1", "pkg:deb/debian/zlib1g@1%3A1.3.dfsg%2Breally1.3.1-1%2Bb1?arch=amd64"),
    ]
