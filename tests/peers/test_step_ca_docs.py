"""What docs/issuers.md and docs/from-autocert.md show is what happens, with a real step-ca."""

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

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import PolicySubject, RequestedCertificate
from csi_driver.core.spec import CertificateSpec
from tests.peers.step_ca import RealStepCA, new_jwk
from tests.support.provisioner_key import JWE, JWK, PASSWORD

pytestmark = pytest.mark.peers("step-ca", "openssl")

DOCS = Path(__file__).parents[2] / "docs"
LIVES = {"minTLSCertDuration": "5m", "maxTLSCertDuration": "24h"}


def blocks(name: str, language: str) -> list[str]:
    """The code of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / name).read_text(), flags=re.MULTILINE | re.DOTALL)


def documents(name: str) -> list[Any]:
    return [one for block in blocks(name, "yaml") for one in yaml.safe_load_all(block)]


def declared(name: str) -> dict[str, Any]:
    """The step_ca entry that a document shows."""
    entry: dict[str, Any] = next(one for one in documents(name) if "issuers" in one)["issuers"][0]["step_ca"]
    return entry


def real(entry: Mapping[str, Any], ca: RealStepCA, files: Mapping[str, Path]) -> dict[str, Any]:
    """The entry as it is shown, but for where the test's step-ca is and where its credentials are kept."""
    kept = {key: {"file": str(files[key])} for key in ("key", "password") if key in entry}
    return {**entry, "url": ca.url, "root_sha256": ca.root_sha256, **kept}


async def run(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit code, and what a program prints."""
    process = await asyncio.create_subprocess_exec(
        *arguments, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def certmount(command: str, cwd: Path) -> tuple[int, str]:
    """Runs a command line as the documents show it."""
    arguments = shlex.split(command.rpartition(" -- ")[2])
    return await run(
        sys.executable, "-m", "csi_driver.cli.main", *arguments[arguments.index("certmount") + 1 :], cwd=cwd
    )


def write(folder: Path, entry: Mapping[str, Any]) -> None:
    (folder / "issuers.yaml").write_text(yaml.safe_dump({"issuers": [{"name": "step", "step_ca": dict(entry)}]}))


def alike(text: str) -> str:
    """Without what is another one each time: addresses, keys, times."""
    for pattern, word in (
        (r"https://[^ ]+", "URL"),
        (r"\d+ ms", "N ms"),
        (r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])", "KID"),
        (r"SHA256:[0-9A-F:]+\.\.\.", "SHA256"),
        (r"\d{4}-\d\d-\d\d", "DATE"),
        (r"step-ca's is \d s behind", "like ours"),  # a busy machine may take its time between answer and look
    ):
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return text


def shown(name: str, command: str) -> tuple[str, str]:
    """The first console block whose command ends so: the command, and its output."""
    for block in blocks(name, "console"):
        first, _, output = block.partition("\n")
        if first.endswith(command):
            return first.removeprefix("$ "), output
    raise AssertionError(f"{name} shows no {command}")


async def test_the_checks_of_the_issuers_page(tmp_path: Path) -> None:
    """Good, with a signature, and with a key that is another provisioner's: exit code and words as shown."""
    files = {"key": tmp_path / "provisioner.jwe", "password": tmp_path / "password"}
    files["key"].write_text(JWE)
    files["password"].write_text(PASSWORD)
    entry = declared("issuers.md")
    async with RealStepCA(
        tmp_path / "ca", name="Example", jwk=JWK, provisioner=entry["provisioner"], claims=LIVES
    ) as ca:
        write(tmp_path, real(entry, ca, files))
        for ending in ("check step --issuers issuers.yaml", "--issue shop.web.svc"):
            command, output = shown("issuers.md", ending)
            assert alike(output) == alike((await certmount(command, tmp_path))[1])
            assert (await certmount(command, tmp_path))[0] == 0
        files["key"].write_text(json.dumps(new_jwk()))
        code, output = await certmount("certmount issuer check step --issuers issuers.yaml", tmp_path)
        assert code == 1
        wrong = [block for block in blocks("issuers.md", "console") if "WRONG" in block]
        assert alike(wrong[0].partition("\n")[2]) == alike(output)


async def test_the_way_from_autocert(tmp_path: Path) -> None:
    """Its step-ca, its provisioner, its password, and nothing else: what the page declares is usable at once."""
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    entry = declared("from-autocert.md")
    ca = RealStepCA(
        tmp_path / "ca", name="Autocert", jwk=JWK, encrypted_key=JWE, provisioner=entry["provisioner"], claims={}
    )
    (tmp_path / "root_ca.crt").write_bytes(ca.root_file.read_bytes())
    openssl = next(
        line.removeprefix("$ ")
        for block in blocks("from-autocert.md", "console")
        for line in block.splitlines()
        if line.startswith("$ openssl")
    )
    code, fingerprint = await run(*shlex.split(openssl), cwd=tmp_path)
    assert code == 0
    async with ca:
        told = fingerprint.strip().partition("=")[2]
        write(tmp_path, {**real(entry, ca, {"password": password}), "root_sha256": told})
        command, output = shown("from-autocert.md", "certmount issuer check step")
        code, said = await certmount(f"{command} --issuers issuers.yaml", tmp_path)
        assert (code, alike(said)) == (0, alike(output))


def test_autocerts_own_name_gets_through_policy_and_attributes() -> None:
    """The pod that the page shows may have its name by the rule that the page shows, and no other pod may."""
    page = documents("from-autocert.md")
    pod = next(one for one in page if one.get("kind") == "Deployment")["spec"]["template"]["spec"]
    volume = pod["volumes"][0]["csi"]
    assert (volume["driver"], volume["readOnly"]) == ("csi.certmount.dev", True)
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/var/run/autocert.step.sm"
    spec: CertificateSpec = parse_attributes(volume["volumeAttributes"])
    assert spec.issuer == "step"
    rules = next(one for one in page if "policy" in one)
    policy = parse_policy(rules, trust_domain="cluster.local", cluster_domain="cluster.local")
    asked = RequestedCertificate(spec.names, spec.key_type, spec.usages, spec.duration, spec.issuer)
    enabled = {"autocert.step.sm": "enabled"}
    assert policy.decide(PolicySubject(_pod("default"), enabled), asked).names.dns == spec.names.dns
    client = RequestedCertificate(
        Names.of([DNSName.parse("hello-mtls-client.default.pod.cluster.local")]), issuer="step"
    )
    assert policy.decide(PolicySubject(_pod("default"), enabled), client).duration
    assert not policy.judge(PolicySubject(_pod("default"), {}), asked).allowed
    assert not policy.judge(PolicySubject(_pod("other"), enabled), asked).allowed


@pytest.mark.parametrize("name", ["issuers.md", "from-autocert.md"])
def test_permissions_are_those_of_the_secrets_that_the_file_names(name: str) -> None:
    """No more and no less: who follows the page can read what the file refers to."""
    sources = [declared(name)[word] for word in ("key", "password") if word in declared(name)]
    secrets = {tuple(source["secret"].split("/")) for source in sources}
    roles = [one for one in documents(name) if one.get("kind") == "Role"]
    bindings = [one for one in documents(name) if one.get("kind") == "RoleBinding"]
    allowed = {
        (role["metadata"]["namespace"], secret)
        for role in roles
        for rule in role["rules"]
        for secret in rule["resourceNames"]
    }
    assert allowed == secrets
    assert all(
        rule["verbs"] == ["get"] and rule["resources"] == ["secrets"] for role in roles for rule in role["rules"]
    )
    for role, binding in zip(roles, bindings, strict=True):
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        assert binding["metadata"]["namespace"] == role["metadata"]["namespace"]
        account = {"kind": "ServiceAccount", "name": "certmount-authority", "namespace": "certmount"}
        assert binding["subjects"] == [account]


async def test_what_is_wrong_with_the_file_is_told_by_the_command(tmp_path: Path) -> None:
    """Before anything is looked at; unknown names, and Secrets outside a cluster, likewise."""
    file = tmp_path / "issuers.yaml"
    check = "certmount issuer check --issuers issuers.yaml"
    code, output = await certmount(check, tmp_path)
    assert (code, output) == (1, "Error: issuers.yaml cannot be read: No such file or directory\n")
    file.write_text("issuers:\n- {name: step, stepca: {}}\n- {name: internal, step_ca: {url: x}}\n")
    code, output = await certmount(check, tmp_path)
    assert code == 1
    assert output.startswith(
        "Error: issuers.yaml is not valid:\n  issuers[0].stepca (line 2): is not known; did you mean"
    )
    assert "\n  issuers[1].step_ca.url (line 3): 'x' is not the address of a step-ca" in output
    file.write_text("# none\n")
    assert await certmount(check, tmp_path) == (0, "issuers.yaml declares no issuers\n")
    code, output = await certmount("certmount issuer check x --issuers issuers.yaml", tmp_path)
    assert (code, output) == (1, "Error: issuers.yaml has no issuer x; it declares none\n")
    async with RealStepCA(tmp_path / "ca") as ca:
        secret = {"secret": "certmount/step", "key": "jwk"}
        write(tmp_path, {"url": ca.url, "root_sha256": ca.root_sha256, "provisioner": "csi", "key": secret})
        code, output = await certmount(check, tmp_path)
    assert code == 1
    assert "WRONG key: key jwk of Secret certmount/step: there is no cluster to read it from" in output


def _pod(namespace: str) -> PodIdentity:
    return PodIdentity(ServiceAccount(namespace, "default"), "sa", "pod", "uid", "node", "node-uid", 9e9)
