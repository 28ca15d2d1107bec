"""What a pod finds in its volume, from its first command to its deletion. All pods start together."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import cluster
from tests.e2e.host import leftovers_of, mounts_at, target_path, volume_directory
from tests.e2e.pods import BUSYBOX, TLS, Pod, manifest, service, with_script

NAMESPACE = "e2e-volumes"
EXAMPLE = Path(__file__).parents[2] / "deploy" / "example" / "pod.yaml"
SERVER_NAME = f"server.{NAMESPACE}.svc.cluster.local"
FIRST_COMMAND = f"""
for file in root.crt site.crt site.key site.pem; do
  grep -q -e '-----END' {TLS}/$file || exit 1
done
"""
FOREIGN_NAME = "shop.example.com"


def pod(name: str) -> Pod:
    return Pod(NAMESPACE, name)


def _example() -> dict[str, Any]:
    """Return the pod of deploy/example/ with an image that this cluster has."""
    example: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    example["metadata"]["namespace"] = NAMESPACE
    example["spec"]["containers"][0] |= {"image": BUSYBOX, "imagePullPolicy": "Never"}
    return example


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    cluster.create_namespace(NAMESPACE)
    short = {"duration": "20s"}
    writable = manifest(pod("writable"), {"nmae": "x"})
    writable["spec"]["volumes"][0]["csi"]["readOnly"] = False
    cluster.apply(
        manifest(pod("first"), {}, command=["/bin/sh", "-c", FIRST_COMMAND]),
        manifest(pod("root"), {"name": f"root.{NAMESPACE}.svc"}),
        manifest(pod("member"), {}, security={"runAsUser": 1000, "runAsNonRoot": True, "fsGroup": 2000}),
        manifest(pod("outsider"), {"fs-group": "3000"}, security={"runAsUser": 1000, "runAsGroup": 1000}),
        manifest(pod("foreign-name"), {"name": FOREIGN_NAME}),
        manifest(pod("invalid"), {"nmae": "x", "duration": "-1h"}),
        writable,
        _example(),
        service("server", NAMESPACE),
        *with_script(manifest(pod("server"), short | {"name": SERVER_NAME}, labels={"app": "server"}), "server.py"),
        *with_script(manifest(pod("client"), short), "client.py", SERVER_NAME, "10"),
    )
    yield
    # These two renew every few seconds, and later modules do not need them.
    cluster.kubectl("-n", NAMESPACE, "delete", "pods", "server", "client", "--wait=false")


def test_files_exist_before_the_first_command() -> None:
    cluster.wait_for("jsonpath={.status.phase}=Succeeded", "pod/first", namespace=NAMESPACE, seconds=30)


def test_openssl_verifies_chain_and_key(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    assert openssl, "needs openssl"
    pod("root").wait_until_ready()
    for file in ("root.crt", "site.crt", "site.key", "site.pem"):
        (tmp_path / file).write_text(pod("root").read(file))

    def run(*arguments: str) -> str:
        command = [openssl, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    name = f"root.{NAMESPACE}.svc"
    for purpose in ("sslserver", "sslclient"):
        trust = ("-x509_strict", "-CAfile", "root.crt", "-untrusted", "site.crt", "-purpose", purpose)
        assert run("verify", *trust, "-verify_hostname", name, "site.crt") == "site.crt: OK"
    public_key = run("x509", "-in", "site.crt", "-pubkey", "-noout")
    assert run("pkey", "-in", "site.key", "-pubout") == public_key
    assert run("pkey", "-in", "site.pem", "-pubout") == public_key
    assert run("x509", "-in", "site.pem", "-pubkey", "-noout") == public_key
    names = run("x509", "-in", "site.crt", "-noout", "-ext", "subjectAltName")
    assert f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default" in names


def test_volume_is_read_only_for_root_and_on_the_host() -> None:
    pod("root").wait_until_ready()
    for path in ("new", "site.key", "..data/site.key", "..data/new"):
        with pytest.raises(cluster.KubectlError, match="Read-only file system"):
            pod("root").run("touch", f"{TLS}/{path}")
    (mount,) = mounts_at(target_path(pod("root").uid))
    assert {"ro", "nosuid", "nodev", "noexec"} <= mount.options


def test_key_is_readable_only_for_the_pods_group() -> None:
    """With fsGroup the key is 0440 root:fsGroup, so a pod that does not run as root can read it; anyone can read certificates."""
    member, outsider = pod("member"), pod("outsider")
    for one in (member, outsider):
        one.wait_until_ready()
    owners = member.run("stat", "-L", "-c", "%a %u %g", f"{TLS}/site.key", f"{TLS}/site.pem", f"{TLS}/site.crt")
    assert owners.splitlines() == ["440 0 2000", "440 0 2000", "444 0 0"]
    assert "PRIVATE KEY" in member.read("site.key")
    assert "END CERTIFICATE" in outsider.read("site.crt")
    with pytest.raises(cluster.KubectlError, match="Permission denied"):
        outsider.read("site.key")


def test_example_pod_prints_its_certificate() -> None:
    example = pod("certmount-example")
    example.wait_until_ready()
    assert "BEGIN CERTIFICATE" in cluster.wait_until(
        example.logs, seconds=10, what="the example prints its certificate"
    )


def test_invalid_attributes_are_reported_as_pod_events() -> None:
    """The FailedMount event names all invalid fields that the driver can read, with what to write instead."""
    invalid = cluster.wait_for_mount_failure("invalid", NAMESPACE)
    assert "volumeAttributes.nmae: is unknown; did you mean name?" in invalid
    assert "volumeAttributes.duration" in invalid
    assert "pod.spec.volumes[].csi.readOnly: must be true" in cluster.wait_for_mount_failure("writable", NAMESPACE)
    cluster.kubectl("-n", NAMESPACE, "delete", "pod", "invalid", "writable", "--wait=false")


def test_pod_starts_once_the_policy_allows_its_name() -> None:
    """The event contains the name and the reason. After the policy changes, the same pod starts."""
    waiting = pod("foreign-name")
    message = cluster.wait_for_mount_failure(waiting.name, NAMESPACE)
    assert "NameNotAllowed" in message
    assert f"{FOREIGN_NAME}: no policy rule allows this name for service account {NAMESPACE}/default" in message
    uid = waiting.uid
    match = {"namespaces": [NAMESPACE], "serviceAccounts": ["default"]}
    rule = {"match": match, "allow": {"dns": [FOREIGN_NAME]}}
    cluster.change_policy(lambda policy: policy["policy"].append(rule))
    waiting.wait_until_ready(100)
    assert (waiting.uid, waiting.restarts()) == (uid, 0)
    assert FOREIGN_NAME in waiting.certificate().subject.rfc4514_string()


def test_three_rotations_under_mutual_tls_without_an_error() -> None:

    def status() -> dict[str, Any] | None:
        lines = pod("client").logs("--tail=1").splitlines()
        found: dict[str, Any] = json.loads(lines[0]) if lines else {"own": [], "servers": [], "errors": []}
        enough = min(len(found["own"]), len(found["servers"])) > 3
        return found if enough or found["errors"] else None

    seen = cluster.wait_until(status, seconds=90, what="three rotations of both certificates")
    assert seen["errors"] == []
    assert seen["connections"] >= 100
    assert "error" not in pod("server").logs()
    assert [pod("client").restarts(), pod("server").restarts()] == [0, 0]


def test_deleted_pod_leaves_nothing_on_the_node() -> None:
    deleted = pod("root")
    uid = deleted.uid
    directory = volume_directory(uid)
    assert len(leftovers_of(uid, directory)) >= 5
    deleted.delete()
    cluster.wait_until(lambda: not leftovers_of(uid, directory), seconds=30, what=f"no leftovers of pod {uid}")
