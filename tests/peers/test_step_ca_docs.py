"""The examples in docs/issuers.md and docs/from-autocert.md work with a real step-ca."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.core.attributes import CertificateSpec, parse_attributes
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import PolicySubject, RequestedCertificate
from tests.peers.step_ca import RealStepCA, new_jwk
from tests.peers.test_acme_docs import blocks, documents
from tests.support.provisioner_key import JWE, JWK, PASSWORD

pytestmark = pytest.mark.peers("step-ca", "openssl")

LIMITS = {"minTLSCertDuration": "5m", "maxTLSCertDuration": "24h"}


def declared(name: str) -> dict[str, Any]:
    entry: dict[str, Any] = next(one for one in documents(name) if "issuers" in one)["issuers"][0]["step_ca"]
    return entry


def real(entry: Mapping[str, Any], ca: RealStepCA, files: Mapping[str, Path]) -> dict[str, Any]:
    credentials = {key: {"file": str(files[key])} for key in ("key", "password") if key in entry}
    return {**entry, "url": ca.url, "root_sha256": ca.root_sha256, **credentials}


async def run(*arguments: str, cwd: Path) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *arguments, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def certmount(command: str, cwd: Path) -> tuple[int, str]:
    arguments = shlex.split(command.rpartition(" -- ")[2])
    tail = arguments[arguments.index("certmount") + 1 :]
    return await run(sys.executable, "-m", "csi_driver.cli.main", *tail, cwd=cwd)


def write(directory: Path, entry: Mapping[str, Any]) -> None:
    (directory / "issuers.yaml").write_text(yaml.safe_dump({"issuers": [{"name": "step", "step_ca": dict(entry)}]}))


def normalize(text: str) -> str:
    """Replace what differs between runs: addresses, keys and times."""
    for pattern, word in (
        (r"https://[^ ]+", "URL"),
        (r"\d+ ms", "N ms"),
        (r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])", "KID"),
        (r"SHA256:[0-9A-F:]+\.\.\.", "SHA256"),
        (r"\d{4}-\d\d-\d\d", "DATE"),
        (r"step-ca's clock is \d s behind", "in sync"),  # on a busy machine
    ):
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return text


def example(name: str, command: str) -> tuple[str, str]:
    """Return the first console example whose command ends with ``command``, and its output."""
    for block in blocks(name, "console"):
        first, _, output = block.partition("\n")
        if first.endswith(command):
            return first.removeprefix("$ "), output
    raise AssertionError(f"{name} has no example of {command}")


async def test_output_of_issuer_check_is_that_of_the_page(tmp_path: Path) -> None:
    files = {"key": tmp_path / "provisioner.jwe", "password": tmp_path / "password"}
    files["key"].write_text(JWE)
    files["password"].write_text(PASSWORD)
    entry = declared("issuers.md")
    name = entry["provisioner"]
    async with RealStepCA(tmp_path / "ca", name="Example", jwk=JWK, provisioner=name, claims=LIMITS) as ca:
        write(tmp_path, real(entry, ca, files))
        for ending in ("check step --issuers issuers.yaml", "--issue shop.web.svc"):
            command, output = example("issuers.md", ending)
            code, actual = await certmount(command, tmp_path)
            assert (code, normalize(actual)) == (0, normalize(output))
        files["key"].write_text(json.dumps(new_jwk()))
        code, actual = await certmount("certmount issuer check step --issuers issuers.yaml", tmp_path)
        failed = next(block for block in blocks("issuers.md", "console") if "FAIL" in block)
        assert (code, normalize(actual)) == (1, normalize(failed.partition("\n")[2]))


async def test_issuer_of_the_autocert_page_needs_only_its_password(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    entry = declared("from-autocert.md")
    ca = RealStepCA(tmp_path / "ca", name="Autocert", jwk=JWK, encrypted_key=JWE, provisioner=entry["provisioner"])
    (tmp_path / "root_ca.crt").write_bytes(ca.root_file.read_bytes())
    lines = "".join(blocks("from-autocert.md", "console")).splitlines()
    openssl = next(line.removeprefix("$ ") for line in lines if line.startswith("$ openssl"))
    code, fingerprint = await run(*shlex.split(openssl), cwd=tmp_path)
    assert code == 0
    async with ca:
        sha256 = fingerprint.strip().partition("=")[2]
        write(tmp_path, {**real(entry, ca, {"password": password}), "root_sha256": sha256})
        command, output = example("from-autocert.md", "certmount issuer check step")
        code, actual = await certmount(f"{command} --issuers issuers.yaml", tmp_path)
        assert (code, normalize(actual)) == (0, normalize(output))


def test_policy_of_the_autocert_page_allows_only_its_pod() -> None:
    page = documents("from-autocert.md")
    pod = next(one for one in page if one.get("kind") == "Deployment")["spec"]["template"]["spec"]
    volume = pod["volumes"][0]["csi"]
    assert (volume["driver"], volume["readOnly"]) == ("csi.certmount.dev", True)
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/var/run/autocert.step.sm"
    spec: CertificateSpec = parse_attributes(volume["volumeAttributes"])
    assert spec.issuer == "step"
    rules = next(one for one in page if "policy" in one)
    policy = parse_policy(rules, trust_domain="cluster.local", cluster_domain="cluster.local")
    names = Names.of([DNSName.parse("hello-mtls-client.default.pod.cluster.local")])
    requested = RequestedCertificate.of(spec.names, spec.key_type, spec)

    def subject(namespace: str, labels: Mapping[str, str]) -> PolicySubject:
        account = ServiceAccount(namespace, "default")
        return PolicySubject(PodIdentity(account, "sa", "pod", "uid", "node", "node-uid", 9e9), labels)

    enabled = {"autocert.step.sm": "enabled"}
    assert policy.decide(subject("default", enabled), requested).names.dns == spec.names.dns
    assert policy.decide(subject("default", enabled), RequestedCertificate(names, issuer="step")).duration
    assert not policy.evaluate(subject("default", {}), requested).allowed
    assert not policy.evaluate(subject("other", enabled), requested).allowed


@pytest.mark.parametrize("name", ["issuers.md", "from-autocert.md"])
def test_roles_allow_exactly_the_secrets_of_the_issuers(name: str) -> None:
    sources = [declared(name)[word] for word in ("key", "password") if word in declared(name)]
    roles = [one for one in documents(name) if one.get("kind") == "Role"]
    bindings = [one for one in documents(name) if one.get("kind") == "RoleBinding"]
    rules = [(role["metadata"]["namespace"], rule) for role in roles for rule in role["rules"]]
    allowed = {f"{namespace}/{secret}" for namespace, rule in rules for secret in rule["resourceNames"]}
    assert allowed == {source["secret"] for source in sources}
    assert all(rule["verbs"] == ["get"] and rule["resources"] == ["secrets"] for _, rule in rules)
    account = {"kind": "ServiceAccount", "name": "certmount-authority", "namespace": "certmount"}
    for role, binding in zip(roles, bindings, strict=True):
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        assert binding["metadata"]["namespace"] == role["metadata"]["namespace"]
        assert binding["subjects"] == [account]


async def test_issuer_check_reports_an_invalid_file(tmp_path: Path) -> None:
    file = tmp_path / "issuers.yaml"
    check = "certmount issuer check --issuers issuers.yaml"
    code, output = await certmount(check, tmp_path)
    assert (code, output) == (1, "Error: issuers.yaml cannot be read: No such file or directory\n")
    file.write_text("issuers:\n- {name: step, stepca: {}}\n- {name: internal, step_ca: {url: x}}\n")
    code, output = await certmount(check, tmp_path)
    assert code == 1
    problem = "issuers[0].stepca (line 2): is unknown; did you mean"
    assert output.startswith(f"Error: issuers.yaml is not valid:\n  {problem}")
    assert "\n  issuers[1].step_ca.url (line 3): 'x' is not the address of a step-ca" in output
    file.write_text("# none\n")
    assert await certmount(check, tmp_path) == (0, "issuers.yaml declares no issuers\n")
    code, output = await certmount("certmount issuer check x --issuers issuers.yaml", tmp_path)
    assert (code, output) == (1, "Error: issuers.yaml has no issuer x; it declares no issuers\n")
    async with RealStepCA(tmp_path / "ca") as ca:
        secret = {"secret": "certmount/step", "key": "jwk"}
        write(tmp_path, {"url": ca.url, "root_sha256": ca.root_sha256, "provisioner": "csi", "key": secret})
        code, output = await certmount(check, tmp_path)
    assert code == 1
    assert "FAIL key: key jwk of Secret certmount/step: cannot be read outside a cluster" in output
