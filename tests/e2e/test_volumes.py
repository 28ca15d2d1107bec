"""What a pod finds in its volume, from its first command to its end. All pods start side by side."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.host import mounts_at, target_of, traces_of, volume_folder
from tests.e2e.kubectl import (
    CERTMOUNT,
    KubectlError,
    apply,
    get,
    kubectl,
    make_namespace,
    wait_for,
    wait_until,
    warnings_of,
)
from tests.e2e.pods import BUSYBOX, TLS, Pod, manifest, with_script

NAMESPACE = "e2e-volumes"
EXAMPLE = Path(__file__).parents[2] / "deploy" / "example" / "pod.yaml"
SERVER_NAME = f"server.{NAMESPACE}.svc.cluster.local"
FIRST_COMMAND = f"""
for file in root.crt site.crt site.key site.pem; do
  grep -q -e '-----END' {TLS}/$file || exit 1
done
"""
REFUSED_NAME = "shop.example.com"


def pod(name: str) -> Pod:
    return Pod(NAMESPACE, name)


def _example() -> dict[str, Any]:
    """deploy/example/, with an image that this cluster has."""
    example: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    example["metadata"]["namespace"] = NAMESPACE
    example["spec"]["containers"][0] |= {"image": BUSYBOX, "imagePullPolicy": "Never"}
    return example


def _service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"selector": {"app": name}, "ports": [{"port": 8443}]},
    }


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """All pods of this module, made at once."""
    make_namespace(NAMESPACE)
    short = {"duration": "20s"}
    writable = manifest(pod("writable"), {"nmae": "x"})
    writable["spec"]["volumes"][0]["csi"]["readOnly"] = False
    apply(
        manifest(pod("first"), {}, command=["/bin/sh", "-c", FIRST_COMMAND]),
        manifest(pod("root"), {"name": f"root.{NAMESPACE}.svc"}),
        manifest(pod("member"), {}, security={"runAsUser": 1000, "runAsNonRoot": True, "fsGroup": 2000}),
        manifest(pod("stranger"), {"fs-group": "3000"}, security={"runAsUser": 1000, "runAsGroup": 1000}),
        manifest(pod("refused"), {"name": REFUSED_NAME}),
        manifest(pod("mistaken"), {"nmae": "x", "duration": "-1h"}),
        writable,
        _example(),
        _service("server"),
        *with_script(manifest(pod("server"), short | {"name": SERVER_NAME}, labels={"app": "server"}), "server.py"),
        *with_script(manifest(pod("client"), short), "client.py", SERVER_NAME),
    )
    yield
    # The two rotate every few seconds, which is of no use to the modules that follow.
    kubectl("-n", NAMESPACE, "delete", "pods", "server", "client", "--wait=false")


def test_files_are_there_before_the_first_command() -> None:
    """The first command of the pod's first container finds all four files, complete."""
    wait_for("jsonpath={.status.phase}=Succeeded", "pod/first", namespace=NAMESPACE, seconds=30)


def test_openssl_verifies_the_chain_and_the_key(tmp_path: Path) -> None:
    """OpenSSL builds the chain to the root, for the name that was asked for, and the key is the certificate's."""
    openssl = shutil.which("openssl")
    assert openssl, "needs openssl"
    wait_for("Ready", "pod/root", namespace=NAMESPACE)
    for name in ("root.crt", "site.crt", "site.key", "site.pem"):
        (tmp_path / name).write_text(pod("root").read(name))

    def ask(*arguments: str) -> str:
        return subprocess.run(
            [openssl, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    name = f"root.{NAMESPACE}.svc"
    for purpose in ("sslserver", "sslclient"):
        trust = ("-x509_strict", "-CAfile", "root.crt", "-untrusted", "site.crt", "-purpose", purpose)
        assert ask("verify", *trust, "-verify_hostname", name, "site.crt") == "site.crt: OK"
    public_key = ask("x509", "-in", "site.crt", "-pubkey", "-noout")
    assert ask("pkey", "-in", "site.key", "-pubout") == public_key
    assert ask("pkey", "-in", "site.pem", "-pubout") == public_key
    assert ask("x509", "-in", "site.pem", "-pubkey", "-noout") == public_key
    assert f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default" in ask(
        "x509", "-in", "site.crt", "-noout", "-ext", "subjectAltName"
    )


def test_volume_is_read_only_for_root_and_on_the_host() -> None:
    """A pod's root can't write to its volume, nor can anyone through the host's own mount table."""
    wait_for("Ready", "pod/root", namespace=NAMESPACE)
    for path in ("new", "site.key", "..data/site.key", "..data/new"):
        with pytest.raises(KubectlError, match="Read-only file system"):
            pod("root").run("touch", f"{TLS}/{path}")
    (mount,) = mounts_at(target_of(pod("root").uid))
    assert {"ro", "nosuid", "nodev", "noexec"} <= mount.options


def test_key_is_for_the_pods_group() -> None:
    """With fsGroup the key is 0440 root:fsGroup, so a pod that does not run as root reads it; certificates are for all."""
    wait_for("Ready", "pod/member", "pod/stranger", namespace=NAMESPACE)
    member, stranger = pod("member"), pod("stranger")
    owners = member.run("stat", "-L", "-c", "%a %u %g", f"{TLS}/site.key", f"{TLS}/site.pem", f"{TLS}/site.crt")
    assert owners.splitlines() == ["440 0 2000", "440 0 2000", "444 0 0"]
    assert "PRIVATE KEY" in member.read("site.key")
    assert "END CERTIFICATE" in stranger.read("site.crt")
    with pytest.raises(KubectlError, match="Permission denied"):
        stranger.read("site.key")


def test_example_of_the_manifests_runs() -> None:
    """The pod of deploy/example/ starts and shows its certificate."""
    wait_for("Ready", "pod/certmount-example", namespace=NAMESPACE)
    shown = wait_until(
        lambda: kubectl("-n", NAMESPACE, "logs", "certmount-example"), seconds=10, what="the example prints"
    )
    assert "BEGIN CERTIFICATE" in shown


def test_mistakes_are_told_where_their_author_looks() -> None:
    """A pod's FailedMount event names the faulty fields, all at once where the driver could read them, with what to write."""
    (mistaken, *_) = wait_until(lambda: warnings_of("mistaken", NAMESPACE), seconds=30, what="a FailedMount event")
    assert "volumeAttributes.nmae: is not known; did you mean name?" in mistaken
    assert "volumeAttributes.duration" in mistaken
    (writable, *_) = wait_until(lambda: warnings_of("writable", NAMESPACE), seconds=30, what="a FailedMount event")
    assert "pod.spec.volumes[].csi.readOnly: must be true" in writable
    kubectl("-n", NAMESPACE, "delete", "pod", "mistaken", "writable", "--wait=false")


def test_refused_name_is_told_and_the_pod_starts_once_policy_allows_it() -> None:
    """The event says which name and why; when the policy is fixed, the very same pod starts."""
    refused = pod("refused")
    (message, *_) = wait_until(lambda: warnings_of("refused", NAMESPACE), seconds=30, what="a FailedMount event")
    assert "NameNotAllowed" in message
    assert f"{REFUSED_NAME}: no policy rule allows this name for service account {NAMESPACE}/default" in message
    uid = refused.uid
    policy = yaml.safe_load(get("configmap", "certmount-policy")["data"]["policy.yaml"])
    match = {"namespaces": [NAMESPACE], "serviceAccounts": ["default"]}
    policy["policy"].append({"match": match, "allow": {"dns": [REFUSED_NAME]}})
    patch = {"data": {"policy.yaml": json.dumps(policy)}}
    kubectl("-n", CERTMOUNT, "patch", "configmap", "certmount-policy", "--type=merge", "-p", json.dumps(patch))
    wait_for("Ready", "pod/refused", namespace=NAMESPACE, seconds=100)
    assert (refused.uid, refused.restarts()) == (uid, 0)
    assert REFUSED_NAME in refused.certificate().subject.rfc4514_string()


def test_three_rotations_under_mutual_tls_without_an_error() -> None:
    """A client that connects ten times a second sees its own and its server's certificate rotate three times, without one error."""

    def report() -> dict[str, Any] | None:
        lines = kubectl("-n", NAMESPACE, "logs", "client", "--tail=1").splitlines()
        found: dict[str, Any] = json.loads(lines[0]) if lines else {"own": [], "servers": [], "errors": []}
        enough = min(len(found["own"]), len(found["servers"])) > 3
        return found if enough or found["errors"] else None

    seen = wait_until(report, seconds=90, what="three rotations at both ends")
    assert seen["errors"] == []
    assert seen["connections"] >= 100
    assert "error" not in kubectl("-n", NAMESPACE, "logs", "server")
    assert [pod("client").restarts(), pod("server").restarts()] == [0, 0]


def test_nothing_is_left_of_a_deleted_pod() -> None:
    """After its pod's end the node has no mount, no folder and no record of a volume any more."""
    gone = pod("root")
    uid = gone.uid
    folder = volume_folder(uid)
    assert len(traces_of(uid, folder)) >= 5
    gone.delete()
    wait_until(lambda: not traces_of(uid, folder), seconds=30, what=f"nothing is left of pod {uid}")
