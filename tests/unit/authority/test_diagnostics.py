"""The check before a start: all that is wrong at once, and nothing is changed by looking."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.diagnostics import (
    Check,
    ca_check,
    check,
    permission_checks,
    policy_check,
    token_keys_check,
)
from csi_driver.authority.issuers.external import Finding
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.cluster.token_review import PublishedKeys
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import TokenIssuer


async def one(wanted: Check) -> Finding:
    (finding,) = await check([wanted])
    return finding


async def test_everything_is_looked_at_whatever_fails() -> None:
    """An administrator mends all of it in one go; the order is that of the checks."""

    async def good() -> str:
        await asyncio.sleep(0)
        return "fine"

    async def bad() -> str:
        raise CertmountError(Reason.INVALID_POLICY, Fault("policy[0]", "is bad", "mend it"))

    findings = await check([Check("first", bad), Check("second", good), Check("third", bad)])
    assert [str(finding) for finding in findings] == [
        "WRONG first: InvalidPolicy: policy[0]: is bad; mend it",
        "ok    second: fine",
        "WRONG third: InvalidPolicy: policy[0]: is bad; mend it",
    ]
    assert [finding.ok for finding in findings] == [False, True, False]


async def test_a_defect_is_not_a_finding() -> None:
    """It is shown as what it is."""

    async def broken() -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await check([Check("x", broken)])


@pytest.mark.parametrize(
    "content,good,words",
    [
        ("", True, "0 rules beside the built-in one, revision e3b0c44298fc1c14"),
        (
            'policy:\n- match: {namespaces: ["*"], serviceAccounts: ["*"]}\n  allow: {dns: ["*.example.com"]}\n',
            True,
            "1 rule beside",
        ),
        ("policy: [1]\n", False, "InvalidPolicy: "),
        (None, False, "cannot be read: No such file or directory"),
    ],
)
async def test_the_policy_file(
    content: str | None, good: bool, words: str, tmp_path: Path, metrics: AuthorityMetrics
) -> None:
    """As the authority would read it."""
    file = tmp_path / "policy.yaml"
    if content is not None:
        file.write_text(content)
    policy = PolicyFile(file, metrics, trust_domain="cluster.local", cluster_domain="cluster.local")
    finding = await one(policy_check(policy))
    assert finding.ok is good
    assert words in finding.text


async def test_a_store_without_a_ca_stays_without_one(tmp_path: Path) -> None:
    """A check must not make what the first start is to make."""
    finding = await one(ca_check(DirectoryStore(tmp_path)))
    assert finding.ok
    assert "keeps none yet" in finding.text
    assert not (tmp_path / "ca.json").exists()


async def test_a_ca_is_verified_and_shown_by_its_fingerprint(tmp_path: Path, metrics: AuthorityMetrics) -> None:
    """Byte by byte as it was afterwards."""
    store = DirectoryStore(tmp_path)
    await CertificateAuthority(store, metrics).refresh()
    before = (tmp_path / "ca.json").read_bytes()
    finding = await one(ca_check(store))
    assert finding.ok
    assert "its intermediate ends on" in finding.text
    assert (tmp_path / "ca.json").read_bytes() == before


async def test_a_damaged_ca_is_told(tmp_path: Path, metrics: AuthorityMetrics) -> None:
    """In a store, and in files that others write."""
    (tmp_path / "ca.json").write_text("{")
    (tmp_path / "ca.json").chmod(0o600)
    for source in (DirectoryStore(tmp_path), CAFiles(tmp_path, metrics)):
        finding = await one(ca_check(source))
        assert not finding.ok
        assert "InvalidCA: " in finding.text


async def test_the_token_keys(issuer: TokenIssuer) -> None:
    """How many there are and whose; none is a fault."""

    async def fetch() -> PublishedKeys:
        return issuer.published

    async def fetch_none() -> PublishedKeys:
        return PublishedKeys("x", b'{"keys": []}')

    assert str(await one(token_keys_check(fetch))) == f"ok    token keys: 1 of issuer {issuer.published.issuer}"
    assert "hold no signing key" in (await one(token_keys_check(fetch_none))).text


async def test_each_permission_has_its_line() -> None:
    """With what to do where it is missing."""

    async def has(permission: str) -> bool:
        return permission != "watch pods"

    findings = await check(permission_checks(["list pods", "watch pods"], has))
    assert [finding.ok for finding in findings] == [True, False]
    assert str(findings[0]) == "ok    permission to list pods: permitted"
    assert "watch pods: is not permitted; the roles certmount-authority" in str(findings[1])
