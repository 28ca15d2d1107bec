"""Sets of files, key stores and their passwords, with the driver process and, as root, real mounts."""

from __future__ import annotations

import json
import os
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, load_der_private_key, pkcs12

from csi_driver.core.formats.registry import PRESETS
from tests.integration.node.world import Node, Request
from tests.support.call_failures import failure_of
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import TestCA
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

JAVA = {"files": "java"}
SECRET = "nodePublishSecretRef"


def files(node: Node, request: Request) -> dict[str, bytes]:
    """Return the files of one generation that the pod sees."""
    generation = node.target(request, "..data").resolve()
    shown = {path.name for path in node.target(request).iterdir() if not path.name.startswith("..")}
    assert shown == {path.name for path in generation.iterdir()}
    return {name: (generation / name).read_bytes() for name in shown}


def roots_of(store: bytes, password: bytes) -> list[bytes]:
    entries = pkcs12.load_pkcs12(store, password).additional_certs
    return [entry.certificate.public_bytes(Encoding.DER) for entry in entries]


def serial_of(store: bytes, password: bytes) -> int:
    entry = pkcs12.load_pkcs12(store, password).cert
    assert entry is not None
    return entry.certificate.serial_number


async def failure(node: Node, request: Request) -> str:
    refused = await failure_of(node.publish(request))
    node.assert_nothing_of(request)
    return refused.text


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("java", "autocert")])
async def test_volume_has_the_files_of_its_set(node: Node, preset: str) -> None:
    request = await node.published(attributes={"files": preset, "key-mode": "0400"})
    found = files(node, request)
    assert found.keys() == {*PRESETS[preset].values(), "generation.json"}
    assert json.loads(found["generation.json"])["renew_at"] is not None


async def test_names_and_der(node: Node) -> None:
    attributes = {"key-file": "server.key", "certificate-der-file": "c.der", "key-der-file": "k.der"}
    found = files(node, await node.published(attributes=attributes))
    assert found.keys() == {"root.crt", "site.crt", "server.key", "site.pem", "c.der", "k.der", "generation.json"}
    key = load_der_private_key(found["k.der"], None)
    assert found["site.pem"].startswith(found["server.key"])
    assert key.public_key() is not None


async def test_generated_password_is_kept_over_renewals_roots_and_a_restart(node: Node) -> None:
    node.script.renew_after = timedelta(seconds=1)
    pod = FakePod()
    request = await node.published(pod, JAVA)
    first = files(node, request)
    assert first.keys() == {"keystore.p12", "truststore.p12", "keystore.password", "generation.json"}
    password = first["keystore.password"]
    assert len(password) >= 40
    await node.restart()
    await node.publish(node.kubelet.publish_request(pod, JAVA))

    def renewed() -> bool:
        return serial_of(files(node, request)["keystore.p12"], password) != serial_of(first["keystore.p12"], password)

    await until(renewed, "a renewal")
    node.script.renew_after = None
    another = TestCA("another").der
    await node.watched()
    await node.authority.trust(node.authority.ca.der, another)
    await until(lambda: another in roots_of(files(node, request)["truststore.p12"], password), "the new root")
    last = files(node, request)
    assert last["keystore.password"] == password
    assert json.loads(last["generation.json"])["serial"] == f"{serial_of(last['keystore.p12'], password):x}"


async def test_password_of_the_secret_encrypts_the_stores(node: Node) -> None:
    """A new password in the Secret applies with the next republish, also after a restart of the driver."""
    pod = FakePod()
    request = node.request(pod, JAVA)
    request.secrets["password"] = "first secret"
    await node.publish(request)
    first = files(node, request)
    assert first.keys() == {"keystore.p12", "truststore.p12", "generation.json"}
    serial = serial_of(first["keystore.p12"], b"first secret")
    before = node.state(request)
    await node.publish(request)
    assert node.state(request) == before
    await node.restart()
    await node.publish(request)
    assert node.state(request) == before
    again = node.kubelet.publish_request(pod, JAVA)
    again.secrets["password"] = "second secret"
    await node.publish(again)
    second = files(node, request)
    assert serial_of(second["keystore.p12"], b"second secret") == serial
    assert roots_of(second["truststore.p12"], b"second secret")
    # What the Secret contains is not shown to the pod, logged or recorded.
    places = [
        node.driver.log_text().encode(),
        *second.values(),
        (node.volume_dir(request) / "record.json").read_bytes(),
    ]
    assert not any(secret in place for place in places for secret in (b"first secret", b"second secret"))


async def test_unusable_password_on_a_republish_keeps_the_files(node: Node) -> None:
    request = node.request(attributes=JAVA)
    request.secrets["password"] = "good"
    await node.publish(request)
    before = files(node, request)
    request.secrets["password"] = "bad\n"
    await node.publish(request)
    assert files(node, request) == before
    assert "republish failed; the volume keeps its files" in node.driver.log_text()


@pytest.mark.parametrize(
    "attributes, secret, words",
    [
        ({}, {"password": "x"}, "is set, but no file of the volume has a password; remove it, or add a file"),
        (JAVA, {"pass": "hidden"}, "names a Secret without the key password; add this key to the Secret"),
        (JAVA, {"password": "hidden\n"}, "whose password is not 1 to 128 printable ASCII characters; remove other"),
        (JAVA, {"password": ""}, "whose password is not 1 to 128 printable ASCII characters"),
        (JAVA, {"password": "p" * 129}, "whose password is not 1 to 128 printable ASCII characters"),
        (JAVA, {"password": "pässword"}, "whose password is not 1 to 128 printable ASCII characters"),
    ],
)
async def test_unusable_secret_is_rejected(
    node: Node, attributes: dict[str, str], secret: dict[str, str], words: str
) -> None:
    request = node.request(attributes=attributes)
    request.secrets.update(secret)
    refused = await failure(node, request)
    assert f"InvalidRequest: pod.spec.volumes[].csi.{SECRET}: " in refused
    assert words in refused
    assert "hidden" not in refused


@pytest.mark.parametrize("attributes", [{}, {"uid": "999", "key-mode": "0640"}])
async def test_postgres_needs_a_key_that_others_cannot_read(node: Node, attributes: dict[str, str]) -> None:
    refused = await failure(node, node.request(attributes={"files": "postgres", **attributes}))
    assert refused.endswith(
        "volumeAttributes.files: selects files for a program that rejects the owner and the mode of the key; "
        "set gid or the pod's fsGroup to a group of the program, or uid to its user, with key-mode 0400 or 0600"
    )
    owners = ({"uid": "999"}, {"gid": "999"}) if os.geteuid() == 0 else ()  # only root can change owners
    for each in (*owners, {"key-mode": "0600"}):
        await node.published(attributes={"files": "postgres", **each})


@pytest.mark.root
async def test_driver_needs_no_more_capabilities_for_files_of_another_user(node: Node) -> None:
    """The driver has given up the capability to change the files of others, also for the next generations."""
    node.script.renew_after = timedelta(seconds=1)
    request = await node.published(attributes={"uid": "999", "key-mode": "0600", "bundle-file": "all.pem"})
    first = files(node, request)["site.crt"]
    await until(lambda: files(node, request)["site.crt"] != first, "a renewal")
    second = files(node, request)["site.crt"]
    await until(lambda: files(node, request)["site.crt"] != second, "another renewal")
    found = node.target(request, "site.key").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (999, 0, 0o600)


async def test_pod_does_not_see_the_copy_of_the_driver(node: Node) -> None:
    request = await node.published(attributes=JAVA)
    private = node.volume_dir(request) / "private"
    (stored,) = private.iterdir()
    assert (stat.S_IMODE(private.stat().st_mode), stat.S_IMODE(stored.stat().st_mode)) == (0o700, 0o600)
    assert b"PRIVATE KEY" in stored.read_bytes()
    below = [Path(parent, name) for parent, _, names in os.walk(node.target(request)) for name in names]
    assert not any(b"PRIVATE KEY" in path.read_bytes() for path in below)
