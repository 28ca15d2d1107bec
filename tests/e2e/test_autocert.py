"""docs/from-autocert.md, followed on a real Kubernetes beside a real step-ca: its manifests and its commands as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.core.formats.pem import decode_certificates
from tests.e2e.kubectl import CERTMOUNT, apply, get, kubectl, make_namespace, roll_out, wait_for, wait_until
from tests.peers.step_ca import RealStepCA
from tests.support.provisioner_key import JWE, JWK, PASSWORD

PAGE = (Path(__file__).parents[2] / "docs" / "from-autocert.md").read_text(encoding="utf-8")
BRIDGE = "10.244.0.1"
"""Where pods reach this machine."""
NAMESPACE = "e2e-autocert"
SECONDS = 60


def documents() -> list[Any]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [one for block in blocks for one in yaml.safe_load_all(block)]


def document(key: str) -> Any:
    return next(one for one in documents() if key in one)


def command(part: str) -> str:
    """The command line of the page that has this in it."""
    lines: list[str] = re.findall(r"^\$ (.*)$", PAGE, flags=re.MULTILINE)
    return next(line for line in lines if part in line)


def shell(line: str, folder: Path) -> str:
    """Runs a line of the page as its reader does."""
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[RealStepCA]:
    """What autocert's installation leaves in the namespace ``step``; its step-ca runs on this machine instead of in a pod."""
    names = (BRIDGE, "ca.step.svc.cluster.local")
    ca = RealStepCA(
        tmp_path / "ca", "Autocert", jwk=JWK, encrypted_key=JWE, provisioner="autocert", listen=BRIDGE, names=names
    )
    make_namespace("step")
    here = {"namespace": "step"}
    slice_ = {"name": "ca-1", "labels": {"kubernetes.io/service-name": "ca"}, **here}
    apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "autocert-password", **here}, "stringData": {"password": PASSWORD}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "certs", **here}, "data": {"root_ca.crt": ca.root_file.read_text()}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "ca", **here}, "spec": {"ports": [{"port": 443, "targetPort": ca.port}]}},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": slice_,
            "addressType": "IPv4",
            "ports": [{"port": ca.port}],
            "endpoints": [{"addresses": [BRIDGE]}],
        },
    )  # fmt: skip
    before = {name: get("configmap", name)["data"] for name in ("certmount-issuers", "certmount-policy")}
    async with ca:
        yield ca
    for name, data in before.items():
        configure(name, **data)
    kubectl("delete", "namespace", "step", NAMESPACE, "--ignore-not-found", "--wait=false")


def configure(name: str, **data: str) -> None:
    kubectl("-n", CERTMOUNT, "patch", "configmap", name, "--type=merge", "-p", json.dumps({"data": data}))


@pytest.mark.timeout(300)
async def test_the_page_is_followed(ca: RealStepCA, tmp_path: Path) -> None:
    """From the fingerprint to a pod with a certificate of the same step-ca, where autocert had put its files."""
    shell(command("get configmap certs"), tmp_path)
    fingerprint = shell(command("openssl x509"), tmp_path).strip().partition("=")[2]
    apply(*(one for one in documents() if one.get("kind") in ("Role", "RoleBinding", "NetworkPolicy")))
    issuers = document("issuers")
    issuers["issuers"][0]["step_ca"]["root_sha256"] = fingerprint
    configure("certmount-issuers", **{"issuers.yaml": yaml.safe_dump(issuers)})
    policy = yaml.safe_load(get("configmap", "certmount-policy")["data"]["policy.yaml"])
    # Beside the rules of the other tests, which go on when this one has ended.
    both = {"policy": [*policy["policy"], *document("policy")["policy"]]}
    configure("certmount-policy", **{"policy.yaml": yaml.safe_dump(both)})
    # Sooner than the authority's volumes are looked at again.
    kubectl("-n", CERTMOUNT, "rollout", "restart", "deployment/certmount-authority")
    roll_out("deployment/certmount-authority")
    check = command("certmount issuer check step")
    said = wait_until(lambda: ready(shell(check, tmp_path)), seconds=SECONDS, what="the issuer is usable")
    assert "autocert is a JWK provisioner" in said
    assert f"step-ca at {issuers['issuers'][0]['step_ca']['url']} answers" in said

    make_namespace(NAMESPACE)
    kubectl("label", "namespace", NAMESPACE, "autocert.step.sm=enabled")
    name = f"hello-mtls.{NAMESPACE}.svc.cluster.local"
    apply(moved(name))
    wait_for("Available", "deployment/hello-mtls", namespace=NAMESPACE, seconds=SECONDS)
    folder = "/var/run/autocert.step.sm"
    files = {
        file: kubectl("-n", NAMESPACE, "exec", "deploy/hello-mtls", "--", "cat", f"{folder}/{file}")
        for file in ("root.crt", "site.crt")
    }
    assert decode_certificates(files["root.crt"].encode()) == [ca.root]
    leaf, intermediate = decode_certificates(files["site.crt"].encode())
    assert leaf.subject.rfc4514_string() == f"CN={name}"
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(ca.root)
    mode = kubectl(
        "-n", NAMESPACE, "exec", "deploy/hello-mtls", "--", "stat", "-L", "-c", "%a %g", f"{folder}/site.key"
    )
    assert mode.strip() == "440 999"
    assert shell(command("kubectl get pods -A"), tmp_path) == ""


def ready(said: str) -> str | None:
    return said if said.startswith("step (step_ca)") and "FAIL" not in said else None


def moved(name: str) -> Any:
    """The page's Deployment with an image that this cluster has, in the tests' namespace."""
    deployment = next(one for one in documents() if one.get("kind") == "Deployment")
    deployment["metadata"]["namespace"] = NAMESPACE
    pod = deployment["spec"]["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = 1
    pod["containers"][0] |= {
        "image": "docker.io/local/busybox:1",
        "imagePullPolicy": "Never",
        "command": ["sleep", "3600"],
    }
    pod["volumes"][0]["csi"]["volumeAttributes"]["name"] = name
    return deployment
