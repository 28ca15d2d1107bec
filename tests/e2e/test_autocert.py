"""docs/from-autocert.md: follows its manifests and commands on a real Kubernetes with a real step-ca."""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.core.formats.pem import decode_certificates
from tests.e2e import cluster
from tests.e2e.pods import BUSYBOX
from tests.peers.step_ca import RealStepCA
from tests.support.provisioner_key import JWE, JWK, PASSWORD

PAGE = (Path(__file__).parents[2] / "docs" / "from-autocert.md").read_text(encoding="utf-8")
BRIDGE = "10.244.0.1"  # the address of this machine in the pod network
NAMESPACE = "e2e-autocert"
TIMEOUT_S = 60


def _documents() -> list[Any]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [document for block in blocks for document in yaml.safe_load_all(block)]


def _document(key: str) -> Any:
    return next(document for document in _documents() if key in document)


def _command(part: str) -> str:
    """Return the page's command line that contains ``part``."""
    lines: list[str] = re.findall(r"^\$ (.*)$", PAGE, flags=re.MULTILINE)
    return next(line for line in lines if part in line)


def _shell(line: str, directory: Path) -> str:
    """Run a command line, and return its output; with its errors if it fails."""
    done = subprocess.run(["bash", "-c", line], cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[RealStepCA]:
    """The namespace ``step`` after an installation of autocert; its step-ca runs on this machine instead of in a pod."""
    names = (BRIDGE, "ca.step.svc.cluster.local")
    ca = RealStepCA(
        tmp_path / "ca", "Autocert", jwk=JWK, encrypted_key=JWE, provisioner="autocert", listen=BRIDGE, names=names
    )
    cluster.create_namespace("step")

    def item(kind: str, name: str, version: str = "v1", labels: dict[str, str] | None = None, **fields: Any) -> Any:
        metadata = {"name": name, "namespace": "step", "labels": labels or {}}
        return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}

    cluster.apply(
        item("Secret", "autocert-password", stringData={"password": PASSWORD}),
        item("ConfigMap", "certs", data={"root_ca.crt": ca.root_file.read_text()}),
        item("Service", "ca", spec={"ports": [{"port": 443, "targetPort": ca.port}]}),
        item(
            "EndpointSlice",
            "ca-1",
            "discovery.k8s.io/v1",
            {"kubernetes.io/service-name": "ca"},
            addressType="IPv4",
            ports=[{"port": ca.port}],
            endpoints=[{"addresses": [BRIDGE]}],
        ),
    )
    with cluster.restored_configuration():
        async with ca:
            yield ca
    cluster.delete_namespace("step", NAMESPACE)


@pytest.mark.timeout(300)
async def test_migration_from_autocert(ca: RealStepCA, tmp_path: Path) -> None:
    """The page's steps end with a pod that has a certificate of the same step-ca in autocert's directory."""
    _shell(_command("get configmap certs"), tmp_path)
    fingerprint = _shell(_command("openssl x509"), tmp_path).strip().partition("=")[2]
    cluster.apply(*(each for each in _documents() if each.get("kind") in ("Role", "RoleBinding", "NetworkPolicy")))
    issuers = _document("issuers")
    step_ca = issuers["issuers"][0]["step_ca"]
    step_ca["root_sha256"] = fingerprint
    cluster.patch_config_map("certmount-issuers", {"issuers.yaml": yaml.safe_dump(issuers)})
    # Keep the rules of the other tests.
    cluster.change_policy(lambda policy: policy["policy"].extend(_document("policy")["policy"]))
    cluster.restart_authority()
    check = _command("certmount issuer check step")
    output = cluster.wait_until(
        lambda: _usable(_shell(check, tmp_path)), seconds=TIMEOUT_S, what="the issuer is usable"
    )
    assert "autocert is a JWK provisioner" in output
    assert f"step-ca at {step_ca['url']} answers" in output

    cluster.create_namespace(NAMESPACE)
    cluster.kubectl("label", "namespace", NAMESPACE, "autocert.step.sm=enabled")
    name = f"hello-mtls.{NAMESPACE}.svc.cluster.local"
    cluster.apply(_migrated_deployment(name))
    cluster.wait_for("Available", "deployment/hello-mtls", namespace=NAMESPACE, seconds=TIMEOUT_S)

    def run(*command: str) -> str:
        return cluster.kubectl("-n", NAMESPACE, "exec", "deploy/hello-mtls", "--", *command)

    directory = "/var/run/autocert.step.sm"
    assert decode_certificates(run("cat", f"{directory}/root.crt").encode()) == [ca.root]
    leaf, intermediate = decode_certificates(run("cat", f"{directory}/site.crt").encode())
    assert leaf.subject.rfc4514_string() == f"CN={name}"
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(ca.root)
    assert run("stat", "-L", "-c", "%a %g", f"{directory}/site.key").strip() == "440 999"
    assert _shell(_command("kubectl get pods -A"), tmp_path) == ""


def _usable(output: str) -> str | None:
    return output if output.startswith("step (step_ca)") and "FAIL" not in output else None


def _migrated_deployment(name: str) -> Any:
    """Return the page's Deployment with an image that this cluster has, in the tests' namespace."""
    deployment = next(each for each in _documents() if each.get("kind") == "Deployment")
    deployment["metadata"]["namespace"] = NAMESPACE
    pod = deployment["spec"]["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = 1
    pod["containers"][0] |= {"image": BUSYBOX, "imagePullPolicy": "Never", "command": ["sleep", "3600"]}
    pod["volumes"][0]["csi"]["volumeAttributes"]["name"] = name
    return deployment
