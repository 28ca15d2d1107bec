"""Secrets of an ACME CA for a real ingress controller: kube-lego's and notariat's examples, and renewals under load."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import ssl
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import authority, cluster, host, ingress_controller, secrets
from tests.e2e.secrets import ACME, ECHO, LIST
from tests.peers.bind9 import KEY, Bind9
from tests.peers.pebble import Pebble
from tests.peers.test_acme_docs import documents

pytestmark = [pytest.mark.usefixtures("secrets_controller"), pytest.mark.peers("pebble", "named", "traefik", "openssl")]

BRIDGE = "10.244.0.1"  # the node's address for pods
FILES = "/etc/certmount/issuers"
TSIG = f"{KEY.algorithm}:{KEY.name}:{base64.b64encode(KEY.secret.reveal()).decode()}"


@dataclass(frozen=True)
class Environment:
    """The CA, its DNS server, and the ingress controller."""

    ca: Pebble
    dns: Bind9
    roots: bytes
    address: str  # of the ingress controller

    def context(self, roots: bytes = b"") -> ssl.SSLContext:
        return ssl.create_default_context(cadata=(roots or self.roots).decode())


def _issuers(env: Environment) -> list[Any]:
    common = {
        "directory": env.ca.directory_url,
        "terms_agreed": True,
        "email": "ops@example.com",
        "ca": {"file": f"{FILES}/ca.crt"},
        "roots": {"file": f"{FILES}/roots.pem"},
    }
    http01 = {"ingress_class": ingress_controller.CLASS, "self_test": f"{env.address}:80"}
    servers = {"server": env.dns.address, "resolvers": [env.dns.address], "nameservers": [env.dns.address]}
    dns01 = {**servers, "tsig_secrets": [f"{LIST}/tsigkey"]}
    return [
        {"name": "letsencrypt", "acme": {**common, "account": {"secret": "certmount/letsencrypt"}, "http01": http01}},
        {"name": "dns", "acme": {**common, "account": {"secret": "certmount/dns"}, "dns01": dns01}},
    ]


def _access() -> list[Any]:
    """Return the objects of docs/acme.md for HTTP-01, and the Secrets with the permissions on them."""
    wanted = ("certmount-acme", "certmount-acme-ingress")
    found = [one for one in documents("acme.md") if one.get("metadata", {}).get("name") in wanted]
    objects = [one for one in found if one["kind"] == "Service" or "ingress" in one["metadata"]["name"]]
    granted = ((cluster.CERTMOUNT, ["letsencrypt", "dns"], ["get", "update"]), (LIST, ["tsigkey"], ["get"]))
    group, account = "rbac.authorization.k8s.io", {"name": "certmount-authority", "namespace": cluster.CERTMOUNT}
    for namespace, names, verbs in granted:
        metadata = {"name": "e2e-acme", "namespace": namespace}
        rule = {"apiGroups": [""], "resources": ["secrets"], "resourceNames": names, "verbs": verbs}
        objects += [
            {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": metadata, "rules": [rule]},
            {
                "apiVersion": f"{group}/v1",
                "kind": "RoleBinding",
                "metadata": metadata,
                "roleRef": {"apiGroup": group, "kind": "Role", "name": "e2e-acme"},
                "subjects": [{"kind": "ServiceAccount", **account}],
            },
        ]
    accounts = ("letsencrypt", "dns")
    objects += [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": cluster.CERTMOUNT}}
        for name in accounts
    ]
    tsig = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tsigkey", "namespace": LIST}}
    return [*objects, {**tsig, "stringData": {"tsig": TSIG}}]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    directory = tmp_path_factory.mktemp("acme")
    address = ingress_controller.install()
    hosts = ("echo", "www", f"*.{ACME}")
    records = "\n".join(f"{host} IN A {address}" for host in hosts)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> Environment:
            dns = Bind9(directory / "dns", {"example.com": records}, host=BRIDGE)
            ca = Pebble(directory / "ca", dns.address, host=BRIDGE, http_port=80)
            await stack.enter_async_context(dns.running())
            await stack.enter_async_context(ca.running())
            return Environment(ca, dns, await ca.root_pem(), address)

        environment = runner.run(start())
        try:
            with cluster.restored_configuration():
                cluster.apply(*_access())
                files = {"ca.crt": Path(environment.ca.ca_file).read_text(), "roots.pem": environment.roots.decode()}
                declared = json.dumps({"issuers": _issuers(environment)})
                cluster.patch_config_map("certmount-issuers", {**files, "issuers.yaml": declared})
                cluster.restart_authority()
                yield environment
        finally:
            ingress_controller.uninstall()
            runner.run(stack.aclose())


def wait_until_served(env: Environment, name: str, context: ssl.SSLContext) -> None:
    def served() -> bool:
        try:
            return ingress_controller.fetch(env.address, name, context)[1] == ingress_controller.BODY
        except OSError:
            return False

    cluster.wait_until(served, seconds=20, what=f"https://{name}/")


@pytest.mark.timeout(180)
def test_example_of_kube_lego_gets_https(env: Environment) -> None:
    """The Ingress of the guide is that of kube-lego, with its annotations; only the API group is the current one."""
    (example,) = [one for one in documents("from-kube-lego.md") if one.get("kind") == "Ingress"]
    assert example["metadata"]["annotations"] == {
        "kubernetes.io/tls-acme": "true",
        "kubernetes.io/ingress.class": "nginx",
    }
    cluster.apply(*ingress_controller.site("echoserver", ECHO), example)
    secret = secrets.wait_for_certificate("echoserver-tls", ECHO, "echo.example.com", seconds=60)
    assert secrets.decoded(secret, "tls.crt").count(b"BEGIN") == 2
    wait_until_served(env, "echo.example.com", env.context())
    assert cluster.find("ingress", "-l", "app.kubernetes.io/component=acme-challenge") == []
    assert len(env.ca.issued) == 1


@pytest.mark.timeout(180)
def test_renewal_under_load_fails_no_connection(env: Environment) -> None:
    name = f"renewed.{ACME}.example.com"
    asked = secrets.ingress("site", ACME, {"site": [name]}, duration="45s")
    cluster.apply(*ingress_controller.site("site", ACME), asked)
    secrets.wait_for_certificate("site", ACME, name)
    context = env.context(authority.root())
    wait_until_served(env, name, context)
    with ingress_controller.load(env.address, name, context) as load:
        cluster.wait_until(lambda: len(load.serials) >= 2, seconds=60, what="the renewed certificate")
        count = load.connections
        cluster.wait_until(lambda: load.connections >= count + 40, seconds=10, what="two more seconds of load")
    assert load.failures == []
    assert load.connections > 100


@pytest.mark.timeout(120)
def test_names_of_others_cost_no_order(env: Environment) -> None:
    """The policy decides by the namespace and the name of the Secret."""
    orders = len(env.ca.orders)
    stolen = secrets.ingress("thief", ACME, {"thief": ["echo.example.com"]}, issuer="letsencrypt")
    cluster.apply(stolen)
    message = secrets.wait_for_event("thief", ACME, "NameNotAllowed")
    assert "echo.example.com" in message
    assert secrets.read("thief", ACME) is None
    assert len(env.ca.orders) == orders


@pytest.mark.timeout(180)
def test_leader_that_dies_during_an_order_is_replaced(env: Environment) -> None:
    orders, name = len(env.ca.orders), f"order.{ACME}.example.com"
    leader = secrets.leader()
    cluster.apply(secrets.ingress("order", ACME, {"order": [name]}, issuer="letsencrypt"))
    cluster.wait_until(lambda: len(env.ca.orders) > orders, seconds=30, what="an order", pause=0.02)
    os.kill(host.process_of(leader), signal.SIGKILL)
    assert secrets.read("order", ACME) is None, "the certificate was faster"
    secrets.wait_for_certificate("order", ACME, name, seconds=90)
    # The key of the first order was in the memory of the process that died.
    assert len(env.ca.orders) <= orders + 2


@pytest.mark.timeout(180)
def test_example_of_notariat_gets_its_secret(env: Environment) -> None:
    """The ConfigMap of the guide has notariat's list. A list entry for a name of others gets an event and no order."""
    (example,) = [one for one in documents("from-notariat.md") if one.get("kind") == "ConfigMap"]
    example["metadata"]["namespace"] = LIST
    secrets.use_issuer("dns")
    cluster.apply(*secrets.list_role(), example)
    secret = secrets.wait_for_certificate("cert-example.com", LIST, "example.com", "www.example.com", seconds=60)
    assert secret["metadata"]["annotations"]["certmount.dev/source"] == f"ConfigMap/{LIST}/notariat-config"
    accounts = base64.b64decode(cluster.get("secret", "dns")["data"].get("account.json", ""))
    assert accounts == b"" or b"admin@example.com" in accounts

    orders = len(env.ca.orders)
    bad = [
        {"secret": "cert-others", "domains": ["echo.example.com"]},
        {"secret": "cert-no-name", "domains": ["not a name"]},
    ]
    wanted = yaml.safe_load(example["data"]["certificates"])
    cluster.apply({**example, "data": {"certificates": yaml.safe_dump([*wanted, *bad])}})
    assert "echo.example.com" in secrets.wait_for_event("notariat-config", LIST, "NameNotAllowed")
    assert "not a name" in secrets.wait_for_event("notariat-config", LIST, "InvalidSource")
    assert secrets.read("cert-example.com", LIST) == secret
    assert len(env.ca.orders) == orders
