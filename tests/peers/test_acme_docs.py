"""What docs/acme.md, docs/from-kube-lego.md and docs/from-notariat.md show is what happens, with the real programs."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme.challenge_server import ChallengeServer
from csi_driver.authority.issuers.acme.problems import judge
from csi_driver.authority.issuers.acme.settings import PRODUCTION, STAGING, AcmeSettings, Dns01, Http01
from csi_driver.authority.issuers.acme.tsig import TsigKey
from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.core.attributes import parse_attributes
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import PolicySubject, RequestedCertificate
from csi_driver.core.secret import Secret
from tests.peers.acme import at_work, dns_names, dns_settings, site
from tests.peers.bind9 import Bind9, bind9, key_source
from tests.peers.nginx import Nginx
from tests.peers.processes import LOOPBACK, free_port
from tests.support.requirements import require_program

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("acme.md", "from-kube-lego.md", "from-notariat.md")


def blocks(name: str, language: str) -> list[str]:
    """The code of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / name).read_text(), flags=re.MULTILINE | re.DOTALL)


def documents(name: str) -> list[Any]:
    return [one for block in blocks(name, "yaml") for one in yaml.safe_load_all(block)]


def shown(name: str, key: str) -> Any:
    """The first YAML document of a page that has this key at its top."""
    return next(one for one in documents(name) if key in one)


def settings(name: str) -> list[AcmeSettings]:
    """The issuers that a page declares."""
    found = [read_issuers(block.encode()) for block in blocks(name, "yaml") if block.startswith("issuers:")]
    return [one.configuration for (one,) in found if isinstance(one.configuration, AcmeSettings)]


@dataclass(frozen=True)
class Asking:
    """The pod of a page, asking by the page's policy."""

    order: IssuerRequest
    key: ec.EllipticCurvePrivateKey


def asking(name: str) -> Asking:
    """What the desk makes of a page's volume under the page's policy; raises where the page does not fit together."""
    rule = shown(name, "policy")
    pod = next(one.get("spec", one) for one in documents(name) if "volumes" in one.get("spec", one))
    (volume,) = pod["volumes"]
    attributes = volume["csi"]["volumeAttributes"]
    spec = parse_attributes(attributes)
    match = rule["policy"][0]["match"]
    account = ServiceAccount(match["namespaces"][0], match["serviceAccounts"][0])
    identity = PodIdentity(account, "", "edge-0", "", "node-a", "", 2e9)
    policy = parse_policy(rule, trust_domain="cluster.local", cluster_domain="cluster.local")
    key = ec.generate_private_key(ec.SECP256R1())
    request = parse_csr(build_csr(key, spec.names))
    asked = RequestedCertificate(request.names, request.key_type, spec.usages, spec.duration, spec.issuer)
    grant = policy.decide(PolicySubject(identity), asked)
    return Asking(IssuerRequest(request, grant, identity, asked), key)


@pytest.mark.parametrize("name", PAGES)
def test_what_is_declared_is_allowed_and_can_be_ordered(name: str) -> None:
    """Issuer, policy and volume of each page fit together; staging comes first, and production is named."""
    first = settings(name)[0]
    assert first.directory == STAGING
    assert first.terms_agreed
    assert judge(*_judged(asking(name)), replace(first, dns01=first.dns01 or Dns01("x"), http01=None))
    assert PRODUCTION in (DOCS / name).read_text()


def _judged(one: Asking) -> tuple[Any, Any, Any]:
    return one.order.request.names, one.order.grant, one.order.asked


def test_the_objects_belong_together() -> None:
    """Roles give what the page says to the account that the manifests have, on the Secrets that the issuers name."""
    objects = [one for one in documents("acme.md") if "kind" in one]
    roles = {one["metadata"]["name"]: one for one in objects if one["kind"] == "Role"}
    for binding in (one for one in objects if one["kind"] == "RoleBinding"):
        assert binding["roleRef"]["name"] in roles
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": "certmount-authority", "namespace": "certmount"}
        ]
    account, tsig = (rule["resourceNames"][0] for rule in roles["certmount-acme"]["rules"])
    declared = settings("acme.md")[0]
    assert (declared.account.namespace, declared.account.name) == ("certmount", account)
    assert declared.dns01 is not None
    assert str(declared.dns01.key) == f"key tsig of Secret certmount/{tsig}"
    assert roles["certmount-acme-ingress"]["rules"][0]["verbs"] == ["create", "delete"]


def _tsig() -> TsigKey:
    """The key as the page gives it to kubectl."""
    (text,) = re.findall(r"--from-literal=tsig=(\S+)", (DOCS / "acme.md").read_text())
    return TsigKey.parse(Secret(text), "docs/acme.md")


@dataclass(frozen=True)
class Documented(Bind9):
    """bind9 with the page's own key and zone."""

    def _configuration(self) -> str:
        options = super()._configuration().partition("key ")[0]
        (block,) = blocks("acme.md", "named")
        return options + block


@contextlib.asynccontextmanager
async def documented(folder: Path) -> AsyncIterator[Documented]:
    ordinary = bind9(folder, {"example.com": ""}, key=_tsig())
    yield Documented(ordinary.folder, ordinary.port, ordinary.zones, ordinary.granted, ordinary.key)


@pytest.mark.peers("pebble", "named", "openssl", "tsig-keygen")
@pytest.mark.parametrize("name", ["acme.md", "from-notariat.md"])
async def test_dns_as_it_is_set_up(tmp_path: Path, name: str) -> None:
    """With bind9 configured as the page has it, and the key as kubectl is given it, the page's pod gets its certificate."""
    async with documented(tmp_path / "dns") as server, site(tmp_path, server) as one:
        declared = settings(name)[0]
        own = replace(
            declared,
            account=one.settings.account,
            directory=one.settings.directory,
            ca_file=one.settings.ca_file,
            roots_file=one.settings.roots_file,
            dns01=replace(dns_settings(server), key=key_source(tmp_path, _tsig())),
        )
        issuer = one.issuer(own)
        order = asking(name).order
        async with at_work(issuer):
            assert dns_names((await issuer.issue(order)).chain) == {str(dns) for dns in order.request.names.dns}


@pytest.mark.peers("tsig-keygen")
def test_the_key_is_made_as_shown() -> None:
    """tsig-keygen prints what the page says, but for the secret."""
    (block,) = [one for one in blocks("acme.md", "console") if "tsig-keygen" in one]
    command, _, output = block.partition("\n")
    made = subprocess.run(command.removeprefix("$ ").split(), capture_output=True, text=True, check=True).stdout
    secret = re.compile(r'secret "[^"]+"')
    assert secret.sub("", made) == secret.sub("", output)
    assert secret.search(blocks("acme.md", "named")[0])[0] == secret.search(output)[0]  # type: ignore[index]  # both have one


@pytest.mark.peers("pebble", "named", "openssl")
async def test_a_delegation_as_it_is_shown(tmp_path: Path) -> None:
    """The page's CNAME leads the proof of the page's pod into a zone of its own."""
    (record,) = blocks("acme.md", "zone")
    zones = {"example.com": record, "acme.example.com": ""}
    server = bind9(tmp_path / "dns", zones, granted=frozenset({"acme.example.com"}), recursive=True)
    async with site(tmp_path, server) as one:
        issuer = one.issuer()
        async with at_work(issuer):
            assert dns_names((await issuer.issue(asking("acme.md").order)).chain) == {"shop.example.com"}


@pytest.mark.peers("pebble", "named", "nginx", "openssl")
async def test_the_way_from_kube_lego(tmp_path: Path) -> None:
    """With nginx's route of acme.md the page's pod gets its certificate; nginx takes the files as the page has it serve them."""
    route = blocks("acme.md", "nginx")[0]
    zone = bind9(tmp_path / "dns", {"example.com": ""})
    nginx = Nginx(tmp_path / "nginx", "")
    async with site(tmp_path, zone, http_port=nginx.port) as one:
        declared = settings("from-kube-lego.md")[0]
        assert declared.http01 is not None
        assert declared.while_pending == "internal"
        issuer = one.issuer(replace(one.settings, dns01=None, http01=Http01(self_test=nginx.address)))
        server = ChallengeServer(f"{LOOPBACK}:0", lambda: (issuer,))
        port = await server.start()
        locations = route.replace("certmount-acme.certmount.svc.cluster.local", f"{LOOPBACK}:{port}")
        assert locations != route
        try:
            pod = asking("from-kube-lego.md")
            async with replace(nginx, locations=locations).running(), at_work(issuer):
                issued = await issuer.issue(pod.order)
        finally:
            await server.stop()
    assert dns_names(issued.chain) == {"shop.example.com", "www.shop.example.com"}
    await asyncio.to_thread(_nginx_takes, tmp_path, pod.key, issued.chain)


def _nginx_takes(folder: Path, key: ec.EllipticCurvePrivateKey, chain: tuple[bytes, ...]) -> None:
    files = folder / "tls"
    files.mkdir()
    (files / "site.crt").write_bytes(encode_certificates(parse_certificates(chain, "chain")))
    (files / "site.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (block,) = blocks("from-kube-lego.md", "nginx")
    text = block.replace("/etc/tls", str(files)).replace("listen 443 ssl", f"listen {LOOPBACK}:{free_port()} ssl")
    paths = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = folder / "tls.conf"
    configuration.write_text(
        f"pid {folder}/tls.pid; events {{}} http {{ access_log off; {paths} {text} }}", encoding="ascii"
    )
    subprocess.run(
        [require_program("nginx"), "-t", "-e", str(folder / "tls.log"), "-c", str(configuration)], check=True
    )


@pytest.mark.peers("pebble", "named", "openssl")
async def test_the_check(tmp_path: Path) -> None:
    """``certmount issuer check`` of the pages, with a file as from-notariat.md has it for a look outside of a cluster."""
    async with documented(tmp_path / "dns") as server, site(tmp_path, server) as one:
        entry = shown("from-notariat.md", "issuers")["issuers"][0]["acme"]
        entry |= {
            "account": {"folder": str(tmp_path / "account")},
            "directory": one.settings.directory,
            "ca": {"file": one.settings.ca_file},
            "roots": {"file": one.settings.roots_file},
        }
        entry["dns01"] = {
            "server": server.address,
            "tsig": {"file": key_source(tmp_path, _tsig()).path},
            "zone": "example.com",
            "resolvers": [server.address],
            "nameservers": [server.address],
        }
        file = tmp_path / "issuers.yaml"
        file.write_text(yaml.safe_dump({"issuers": [{"name": "letsencrypt", "acme": entry}]}), encoding="utf-8")
        command = ["issuer", "check", "letsencrypt", "--issuers", str(file)]
        assert "DNS update" in await _certmount(*command)
        signed = await _certmount(*command, "--issue", "shop.example.com")
        assert "signed shop.example.com with a chain of 2" in signed


async def _certmount(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "csi_driver.cli.main", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()
