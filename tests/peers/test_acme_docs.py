"""The examples in docs/acme.md, docs/from-kube-lego.md and docs/from-notariat.md work with the real programs."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme.config import PRODUCTION, STAGING, AcmeConfiguration, Dns01, Http01
from csi_driver.authority.issuers.acme.order_rules import order_names
from csi_driver.authority.issuers.acme.tsig_key import TsigKey
from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.core.attributes import parse_attributes
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import PolicySubject, RequestedCertificate
from csi_driver.core.secret import Secret
from tests.peers.acme import (
    acme_environment,
    challenge_server,
    dns_configuration,
    dns_names,
    request_for,
    running_issuers,
)
from tests.peers.bind9 import Bind9, key_source
from tests.peers.nginx import Nginx
from tests.peers.processes import LOOPBACK

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("acme.md", "from-kube-lego.md", "from-notariat.md")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / name).read_text(), flags=re.MULTILINE | re.DOTALL)


def documents(name: str) -> list[Any]:
    return [one for block in blocks(name, "yaml") for one in yaml.safe_load_all(block)]


def document_with(name: str, key: str) -> Any:
    return next(one for one in documents(name) if key in one)


def configurations(name: str) -> list[AcmeConfiguration]:
    found = [read_issuers(block.encode()) for block in blocks(name, "yaml") if block.startswith("issuers:")]
    return [declared.configuration for (declared,) in found if isinstance(declared.configuration, AcmeConfiguration)]


def pod_request() -> IssuerRequest:
    """Apply the policy of acme.md to the request of its pod; raise if they do not match."""
    rule = document_with("acme.md", "policy")
    pod = next(one for one in documents("acme.md") if "volumes" in one)
    (volume,) = pod["volumes"]
    spec = parse_attributes(volume["csi"]["volumeAttributes"])
    match = rule["policy"][0]["match"]
    account = ServiceAccount(match["namespaces"][0], match["serviceAccounts"][0])
    identity = PodIdentity(account, "", "edge-0", "", "node-a", "", 2e9)
    policy = parse_policy(rule, trust_domain="cluster.local", cluster_domain="cluster.local")
    csr = parse_csr(build_csr(ec.generate_private_key(ec.SECP256R1()), spec.names))
    requested = RequestedCertificate.of(csr.names, csr.key_type, spec)
    return IssuerRequest(csr, policy.decide(PolicySubject(identity), requested), identity, requested)


def request_of(name: str) -> IssuerRequest:
    """Return the request for the certificate of a page: of its pod, its Ingress, or its list."""
    if name == "acme.md":
        return pod_request()
    if name == "from-kube-lego.md":
        return request_for(*document_with(name, "spec")["spec"]["tls"][0]["hosts"])
    return request_for(*yaml.safe_load(document_with(name, "data")["data"]["certificates"])[0]["domains"])


@pytest.mark.parametrize("name", PAGES)
def test_issuer_of_a_page_signs_the_names_of_the_page(name: str) -> None:
    first = configurations(name)[0]
    assert first.directory == STAGING
    assert first.terms_agreed
    assert order_names(request_of(name), replace(first, dns01=first.dns01 or Dns01("x"), http01=None))
    assert PRODUCTION in (DOCS / name).read_text()


def test_roles_match_the_account_and_the_secrets_of_the_issuers() -> None:
    objects = [one for one in documents("acme.md") if "kind" in one]
    roles = {one["metadata"]["name"]: one for one in objects if one["kind"] == "Role"}
    for binding in (one for one in objects if one["kind"] == "RoleBinding"):
        assert binding["roleRef"]["name"] in roles
        subject = {"kind": "ServiceAccount", "name": "certmount-authority", "namespace": "certmount"}
        assert binding["subjects"] == [subject]
    account, tsig = (rule["resourceNames"][0] for rule in roles["certmount-acme"]["rules"])
    declared = configurations("acme.md")[0]
    assert (declared.account.namespace, declared.account.name) == ("certmount", account)
    assert declared.dns01 is not None
    assert str(declared.dns01.key) == f"key tsig of Secret certmount/{tsig}"
    assert roles["certmount-acme-ingress"]["rules"][0]["verbs"] == ["create", "delete"]


def _tsig() -> TsigKey:
    (text,) = re.findall(r"--from-literal=tsig=(\S+)", (DOCS / "acme.md").read_text())
    return TsigKey.parse(Secret(text), "docs/acme.md")


@dataclass(frozen=True)
class Documented(Bind9):
    """bind9 with the configuration of the page."""

    def _configuration(self) -> str:
        options = super()._configuration().partition("key ")[0]
        (block,) = blocks("acme.md", "named")
        return options + block


def documented(directory: Path) -> Documented:
    return Documented(directory, {"example.com": ""}, key=_tsig())


@pytest.mark.peers("pebble", "named", "openssl", "tsig-keygen")
@pytest.mark.parametrize("name", ["acme.md", "from-notariat.md"])
async def test_page_gets_its_certificate_with_the_bind9_configuration(tmp_path: Path, name: str) -> None:
    server = documented(tmp_path / "dns")
    async with acme_environment(tmp_path, server) as env:
        declared = configurations(name)[0]
        real = ("account", "directory", "ca_file", "roots_file")
        dns01 = replace(dns_configuration(server), key=key_source(tmp_path, _tsig()))
        own = replace(declared, dns01=dns01, **{name: getattr(env.configuration, name) for name in real})
        issuer = env.issuer(own)
        request = request_of(name)
        async with running_issuers(issuer):
            assert dns_names((await issuer.issue(request)).chain) == {str(dns) for dns in request.csr.names.dns}


@pytest.mark.peers("tsig-keygen")
def test_output_of_tsig_keygen_is_that_of_the_page() -> None:
    (block,) = [one for one in blocks("acme.md", "console") if "tsig-keygen" in one]
    command, _, output = block.partition("\n")
    made = subprocess.run(command.removeprefix("$ ").split(), capture_output=True, text=True, check=True).stdout
    secret = re.compile(r'secret "[^"]+"')
    assert secret.sub("", made) == secret.sub("", output)
    assert secret.search(blocks("acme.md", "named")[0])[0] == secret.search(output)[0]  # type: ignore[index]  # both contain a secret


@pytest.mark.peers("pebble", "named", "openssl")
async def test_delegation_of_the_page_works(tmp_path: Path) -> None:
    (record,) = blocks("acme.md", "zone")
    zones = {"example.com": record, "acme.example.com": ""}
    server = Bind9(tmp_path / "dns", zones, granted=frozenset({"acme.example.com"}), recursive=True)
    async with acme_environment(tmp_path, server) as env:
        issuer = env.issuer()
        async with running_issuers(issuer):
            assert dns_names((await issuer.issue(pod_request())).chain) == {"shop.example.com"}


@pytest.mark.peers("pebble", "named", "nginx", "openssl")
async def test_migration_from_kube_lego_works_with_the_route_of_the_page(tmp_path: Path) -> None:
    """Instead of an Ingress for each challenge, the fixed route of acme.md can lead to the authority."""
    route = blocks("acme.md", "nginx")[0]
    zone = Bind9(tmp_path / "dns", {"example.com": ""})
    nginx = Nginx(tmp_path / "nginx", "")
    declared = configurations("from-kube-lego.md")[0]
    assert declared.http01 is not None
    async with acme_environment(tmp_path, zone, http_port=nginx.port) as env:
        issuer = env.issuer(replace(env.configuration, dns01=None, http01=Http01(self_test=nginx.address)))
        async with challenge_server(issuer) as port:
            locations = route.replace("certmount-acme.certmount.svc.cluster.local", f"{LOOPBACK}:{port}")
            assert locations != route
            async with replace(nginx, locations=locations).running(), running_issuers(issuer):
                issued = await issuer.issue(request_of("from-kube-lego.md"))
    assert dns_names(issued.chain) == {"echo.example.com"}


@pytest.mark.peers("pebble", "named", "openssl")
async def test_issuer_check_works_with_the_file_of_from_notariat(tmp_path: Path) -> None:
    server = documented(tmp_path / "dns")
    async with acme_environment(tmp_path, server) as env:
        declared = document_with("from-notariat.md", "issuers")["issuers"][0]["acme"]
        real = env.declaration()
        entry = declared | real | {"dns01": real["dns01"] | {"zone": "example.com"}}
        file = tmp_path / "issuers.yaml"
        file.write_text(yaml.safe_dump({"issuers": [{"name": "letsencrypt", "acme": entry}]}), encoding="utf-8")
        command = ["issuer", "check", "letsencrypt", "--issuers", str(file)]
        assert "DNS update" in await _certmount(*command)
        output = await _certmount(*command, "--issue", "shop.example.com")
        assert "a certificate for shop.example.com with a chain of 2" in output


async def _certmount(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "csi_driver.cli.main", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()
