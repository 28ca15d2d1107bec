"""The examples in docs/kubernetes-csr.md are valid, and its tables are complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER
from csi_driver.core.errors import REASONS
from csi_driver.kube.permissions import SIGNER_LEASE

PAGE = (Path(__file__).parents[5] / "docs" / "kubernetes-csr.md").read_text()


def blocks() -> Iterator[Any]:
    for block in PAGE.split("```yaml\n")[1:]:
        yield from yaml.safe_load_all(block.split("```")[0])


def test_example_issuers_are_valid_and_the_role_allows_their_signer() -> None:
    (text,) = [yaml.safe_dump(block) for block in blocks() if "issuers" in block]
    (declared,) = read_issuers(text.encode())
    assert isinstance(declared.configuration, KubernetesCSRConfiguration)
    (role,) = [block for block in blocks() if block.get("kind") == "ClusterRole"]
    named = [name for rule in role["rules"] for name in rule.get("resourceNames", ())]
    assert named == [declared.configuration.signer]


def test_table_lists_all_keys() -> None:
    rows = PAGE.split("| key | meaning |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in rows.splitlines()[2:]))) == {
        field.name for field in fields(KubernetesCSRConfiguration)
    }


def test_table_lists_existing_reasons() -> None:
    rows = PAGE.split("| checked | reason |")[1].split("\n\n")[0].splitlines()[2:]
    reasons = {word for row in rows for word in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert reasons <= set(REASONS)
    assert {"InvalidCSR", "TokenRejected", "ServiceAccountDenied", "NameNotAllowed", "TooManyRequests"} == reasons


def test_page_names_the_signer_and_the_lease() -> None:
    assert CERTMOUNT_SIGNER in PAGE
    assert SIGNER_LEASE in PAGE
