"""``certmount authority --check``: all findings at once, without changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.authority.diagnostics import (
    DiagnosticCheck,
    ca_check,
    issuers_check,
    permission_checks,
    policy_check,
    run_checks,
    token_keys_check,
)
from csi_driver.authority.issuers import Finding
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.cluster.objects import PublishedKeys
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import TokenIssuer


async def run(check: DiagnosticCheck) -> Finding:
    (finding,) = await run_checks([check])
    return finding


async def test_all_checks_run_in_order_even_if_some_fail() -> None:
    async def succeed() -> str:
        await asyncio.sleep(0)
        return "valid"

    async def fail() -> str:
        raise CertmountError(Reason.INVALID_POLICY, Fault("policy[0]", "is invalid", "fix it"))

    checks = [DiagnosticCheck("first", fail), DiagnosticCheck("second", succeed), DiagnosticCheck("third", fail)]
    findings = await run_checks(checks)
    first, third = (Finding(name, False, "InvalidPolicy: policy[0]: is invalid; fix it") for name in ("first", "third"))
    assert findings == [first, Finding("second", True, "valid"), third]


async def test_unexpected_exception_is_not_a_finding() -> None:
    async def raise_defect() -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run(DiagnosticCheck("x", raise_defect))


EMPTY_POLICY = "0 rules and the built-in rule, revision e3b0c44298fc1c14"
ONE_RULE = "policy: [{match: {namespaces: [a], serviceAccounts: [b]}, allow: {}}]"


@pytest.mark.parametrize(
    "kind,content,ok,words",
    [
        ("policy", "", True, EMPTY_POLICY),
        ("policy", ONE_RULE, True, "1 rule and the built-in rule"),
        ("policy", "policy: [1]\n", False, "InvalidPolicy: "),
        ("policy", None, False, "cannot be read: No such file or directory"),
        ("issuers", "issuers: []\n", True, "only the internal CA"),
        ("issuers", "issuers: [{}]\n", False, "InvalidIssuers: "),
        ("issuers", None, False, "cannot be read: No such file or directory; see --issuers"),
    ],
)
async def test_files_are_checked(
    kind: str, content: str | None, ok: bool, words: str, tmp_path: Path, metrics: AuthorityMetrics
) -> None:
    file = tmp_path / "file.yaml"
    if content is not None:
        file.write_text(content)
    policy = PolicyFile(file, metrics, trust_domain="cluster.local", cluster_domain="cluster.local")
    finding = await run(policy_check(policy) if kind == "policy" else issuers_check(file))
    assert (finding.ok, words in finding.text) == (ok, True)


async def test_ca_check_verifies_the_ca_without_changes(tmp_path: Path, metrics: AuthorityMetrics) -> None:
    source, file = StoredCA(DirectoryStore(tmp_path)), tmp_path / "ca.json"

    async def check(words: str, *, ok: bool = True) -> None:
        before = file.exists() and file.read_bytes()
        finding = await run(ca_check(source))
        assert (finding.ok, words in finding.text) == (ok, True)
        assert before == (file.exists() and file.read_bytes())

    await check("contains no CA yet")
    await CertificateAuthority(source, metrics).refresh()
    await check("its intermediate expires on")
    file.write_text("{")
    await check("InvalidCA: ", ok=False)


async def test_ca_check_reports_invalid_files(tmp_path: Path, metrics: AuthorityMetrics) -> None:
    finding = await run(ca_check(CAFiles(tmp_path, metrics)))
    assert (finding.ok, "InvalidCA: " in finding.text) == (False, True)


async def test_token_keys_check(issuer: TokenIssuer) -> None:
    async def fetch() -> PublishedKeys:
        return issuer.published

    async def fetch_none() -> PublishedKeys:
        return PublishedKeys("x", b'{"keys": []}')

    name = issuer.published.issuer
    assert await run(token_keys_check(fetch)) == Finding("token keys", True, f"1 of issuer {name}")
    assert "contains no signing key" in (await run(token_keys_check(fetch_none))).text


async def test_permission_checks_explain_a_missing_permission() -> None:
    async def has_permission(permission: str) -> bool:
        return permission != "watch pods"

    listing, watching = await run_checks(permission_checks(["list pods", "watch pods"], has_permission))
    assert listing == Finding("permission to list pods", True, "permitted")
    words = "watch pods: is not permitted; apply the roles certmount-authority"
    assert (watching.ok, words in watching.text) == (False, True)
