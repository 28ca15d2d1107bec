"""The policy file: parsing, faults and reloads."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from csi_driver.authority.policy import policy_file
from csi_driver.authority.policy.policy_file import PolicyFile, read_policy
from csi_driver.core.errors import CertmountError
from csi_driver.core.policy.engine import Policy
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import in_background, until

DOMAINS: dict[str, Any] = {"trust_domain": "cluster.local", "cluster_domain": "cluster.local"}
RULE = """
policy:
- match: {{namespaces: [{}], serviceAccounts: ["*"]}}
  allow: {{dns: ["*.example.com"]}}
"""


def read(text: str | bytes) -> Policy:
    return read_policy(text if isinstance(text, bytes) else text.encode(), **DOMAINS)


def namespaces(policy: Policy) -> list[str]:
    return [name for rule in policy.rules for name in rule.match.namespaces]


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "policy:\n", "policy: []\n", "---\n"])
def test_empty_file_contains_the_default_policy(text: str) -> None:
    assert read(text).rules == ()


@pytest.mark.parametrize(
    "content,words",
    [
        ("a: [*]", "line 1: '*' begins an alias in YAML; write \"*\""),
        ("just words", "policy file: is not a mapping"),
        ("polcy: []", "polcy (line 1): is unknown; did you mean policy?"),
        ("-policy: []", "-policy (line 1): is unknown; write '- policy:', with a space after '-'"),
        ("policy:[]: x", "policy:[] (line 1): is unknown; write 'policy: ', with a space after ':'"),
        ("# rules\npolicy:\n- match: {namespaces: [a]}\n", "policy[0].match.serviceAccounts (line 3): is missing"),
        (
            "policy:\n- match: {}\n-\n  allow:\n    dns:\n    - a.b\n    - A\n",
            "policy[1].allow.dns[1] (line 7): 'A' has",
        ),
        ("policy:\n\n- match:\n    namespace: x\n", "policy[0].match.namespace (line 4): is unknown; did you mean"),
        ("deny:\n- match: {namespaces: [a], serviceAccounts: [b]}\n", "deny[0].reason (line 2): is missing"),
    ],
)
def test_invalid_policy_is_rejected_with_line_and_fault(content: str | bytes, words: str) -> None:
    with pytest.raises(CertmountError, match=f"InvalidPolicy: .*{re.escape(words)}"):
        read(content)


def test_rule_labels_contain_line_numbers() -> None:
    text = "# ours\npolicy:\n# all\n- match: {namespaces: ['*'], serviceAccounts: ['*']}\n  allow: {}\n\n-\n  match:\n    namespaces: [a]\n    serviceAccounts: [b]\n  allow:\n    dns: [x.example]\n"
    assert [rule.label for rule in read(text).rules] == ["policy[0] (line 4)", "policy[1] (line 8)"]


class Volume:
    """A ConfigMap volume as the kubelet writes it: files are links through ..data, which the kubelet replaces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.generation = 0
        folder.mkdir()
        self.file = folder / "policy.yaml"
        self.file.symlink_to("..data/policy.yaml")

    def write(self, text: str) -> None:
        self.generation += 1
        new = self.folder / f"..{self.generation}"
        new.mkdir()
        (new / "policy.yaml").write_text(text)
        link = self.folder / "..data_tmp"
        link.symlink_to(new.name)
        link.replace(self.folder / "..data")
        shutil.rmtree(self.folder / f"..{self.generation - 1}", ignore_errors=True)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "policy")


@pytest.fixture
def policy(volume: Volume, metrics: AuthorityMetrics) -> PolicyFile:
    return PolicyFile(volume.file, metrics, **DOMAINS)


async def test_missing_file_fails_the_start(policy: PolicyFile) -> None:
    with pytest.raises(CertmountError, match=r"policy\.yaml: cannot be read: No such file or directory; see --policy"):
        await policy.load()
    assert not policy.loaded
    with pytest.raises(CertmountError, match="not loaded yet") as failure:
        _ = policy.current
    assert failure.value.retryable


async def test_on_change_gets_the_revision_of_each_new_policy(volume: Volume, metrics: AuthorityMetrics) -> None:
    revisions: list[str] = []
    file = PolicyFile(volume.file, metrics, **DOMAINS, on_change=revisions.append)
    for text in (RULE.format("web"), RULE.format("web"), "policy: 7", RULE.format("shop"), RULE.format("web")):
        volume.write(text)
        with contextlib.suppress(CertmountError):
            await file.load()
    web, shop = (hashlib.sha256(RULE.format(name).encode()).hexdigest()[:16] for name in ("web", "shop"))
    assert (revisions, file.current.revision) == ([web, shop, web], web)


async def test_invalid_file_keeps_the_policy(volume: Volume, policy: PolicyFile, registry: CollectorRegistry) -> None:
    for text, words, valid in (
        (RULE.format("web"), "", 1),
        ("policy: [", r"line \d: a .\[. or .{. is not closed", 0),
        ("policy: [", "", 0),  # the same content is reported once
        (RULE.format("web"), "", 1),
        (None, "cannot be read", 0),
    ):
        volume.write(text) if text else volume.file.unlink()
        with pytest.raises(CertmountError, match=words) if words else contextlib.nullcontext():
            await policy.load()
        assert namespaces(policy.current) == ["web"]
        assert registry.get_sample_value("certmount_policy_valid") == valid
    assert registry.get_sample_value("certmount_policy_reload_failures_total") == 2


async def test_changes_are_followed(volume: Volume, policy: PolicyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_file, "_CHECK_S", 0.005)
    volume.write(RULE.format("web"))
    await policy.load()
    with capture_logs() as logs:
        async with in_background(policy.run()):
            volume.write("policy: 7")
            await until(lambda: any(entry["log_level"] == "error" for entry in logs), "the rejection")
            volume.write(RULE.format("shop"))
            await until(lambda: namespaces(policy.current) == ["shop"], "the new policy")
    (rejection,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert "policy (line 1): is not a list" in rejection["error"]
