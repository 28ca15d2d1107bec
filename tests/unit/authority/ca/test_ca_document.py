"""The commands of docs/ca.md create a valid CA, and its tables match the code."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.keyring import AUTHORITY_KEY_TYPES, KEYRING_FILES
from csi_driver.authority.trust.serving_certificate import SERVING, SERVING_KEY
from csi_driver.core.certificates.name_constraints import NameConstraintSet, parse_constraint
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

DOCUMENT = (Path(__file__).parents[4] / "docs" / "ca.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Return the commands that need no cluster, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if not line.startswith("kubectl ")]


@pytest.fixture
def printed(tmp_path: Path) -> str:
    """Return the output of all commands."""
    script = "\n".join(["set -e", *commands()])
    return subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=True, text=True).stdout


@pytest.mark.peers("openssl", "bash")
async def test_documented_commands_create_a_valid_ca(printed: str, tmp_path: Path, metrics: AuthorityMetrics) -> None:
    """The CA is valid for names of the cluster only. The last command prints the fingerprint that the authority logs."""
    assert "intermediate.crt: OK" in printed
    keyring = (await CAFiles(tmp_path, metrics).refresh(datetime.now(UTC))).keyring
    bounds = NameConstraintSet.of((keyring.intermediate.certificate, *keyring.chain, keyring.root))
    inside = ["shop.web.svc", "shop.web.svc.cluster.local"]
    assert bounds.violations(Names.of(map(DNSName.parse, inside), [spiffe_id("cluster.local", "web", "shop")])) == []
    assert len(bounds.violations(Names.of([DNSName.parse("example.com")], [spiffe_id("other", "web", "shop")]))) == 2
    assert fingerprint(keyring.root).removeprefix("SHA256:") == printed.strip().rpartition("=")[2]


def test_page_names_all_files_key_types_and_constraints() -> None:
    """The page names each stored value and each key type of a CA, and its examples of constraints can be parsed."""
    assert all(f"`{name}`" in DOCUMENT for name in (*KEYRING_FILES, SERVING, SERVING_KEY))
    assert all(f"`{kind.value}`" in DOCUMENT for kind in AUTHORITY_KEY_TYPES)
    examples = re.findall(r"`((?:dns|uri|ip|email):[^`]+)`", DOCUMENT)
    assert len({parse_constraint(example) for example in examples}) >= 6
