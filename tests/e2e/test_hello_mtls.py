"""examples/hello-mtls: client and server of each language connect by mutual TLS while their certificates are renewed."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import cluster
from tests.e2e.host import LOCALKUBE
from tests.e2e.pods import BUSYBOX, Pod
from tests.support.hello_mtls import EXAMPLES, LANGUAGES, PROGRAMS, build
from tests.support.requirements import require_program

LIFETIME_S = 30  # in place of the minute of the manifests, so that the test takes half as long
# The other pods use this machine's programs, because no registry with the base images of the examples is available.
_PYTHON_IMAGE = "docker.io/local/hello-mtls-python:e2e"
_HOST = {"/usr": "/usr", "/lib": "/usr/lib", "/lib64": "/usr/lib64"}
_HOST |= {str(path): str(path) for path in map(Path, ("/etc/alternatives", "/etc/passwd", "/etc/group", "/etc/ssl"))}
_HOST |= {str(path): str(path) for path in Path("/etc").glob("java-*")}
_EMPTY = ("/tmp", "/var/lib/nginx", "/var/log/nginx")  # paths in the pod
_IDENTITY = {"nginx": "hello certificate "}  # nginx prints the serial number of the client's certificate


def _namespace(language: str) -> str:
    return f"e2e-hello-{language}"


@pytest.fixture(scope="module")
def application() -> Iterator[Path]:
    """The directories with the programs. Not tmp_path, which only root can enter."""
    directory = Path("/var/tmp/certmount-hello-mtls")  # the kubelet mounts it
    shutil.rmtree(directory, ignore_errors=True)
    for language in LANGUAGES:
        (directory / language).mkdir(parents=True)
        if language in PROGRAMS:
            require_program(PROGRAMS[language])
        build(language, directory / language)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module", autouse=True)
def scene(application: Path) -> Iterator[None]:
    """All languages at the same time."""
    # Its base image is that of certmount, which the test cluster builds too.
    subprocess.run([LOCALKUBE / "image.sh", _PYTHON_IMAGE, EXAMPLES / "python"], check=True, timeout=300)
    for language in LANGUAGES:
        cluster.create_namespace(_namespace(language))
        documents = yaml.safe_load_all((EXAMPLES / language / "manifest.yaml").read_text())
        cluster.apply(*(_on_this_machine(one, language, application) for one in documents))
    yield
    cluster.delete_namespace(*map(_namespace, LANGUAGES))


def _on_this_machine(item: Mapping[str, Any], language: str, application: Path) -> Any:
    """Return an object of a manifest in the test's namespace; a pod with the machine's programs in place of its image."""
    item = {**item, "metadata": {**item["metadata"], "namespace": _namespace(language)}}
    if item["kind"] != "Pod":
        return item
    (container,), (volume,) = item["spec"]["containers"], item["spec"]["volumes"]
    volume["csi"]["volumeAttributes"]["duration"] = f"{LIFETIME_S}s"
    item["spec"]["terminationGracePeriodSeconds"] = 1
    if language == "python":
        container |= {"image": _PYTHON_IMAGE, "imagePullPolicy": "Never"}
        return item
    container |= {"image": BUSYBOX, "imagePullPolicy": "Never"}
    container.setdefault("env", []).append({"name": "PATH", "value": "/usr/sbin:/usr/bin:/bin"})
    paths = {"/app": str(application / language)} | {
        inside: outside for inside, outside in _HOST.items() if Path(outside).exists()
    }
    mounts = [({"hostPath": {"path": outside}}, inside, True) for inside, outside in paths.items()]
    mounts += [({"emptyDir": {}}, inside, False) for inside in _EMPTY]
    for number, (source, inside, read_only) in enumerate(mounts):
        item["spec"]["volumes"].append({"name": f"host-{number}", **source})
        container["volumeMounts"].append({"name": f"host-{number}", "mountPath": inside, "readOnly": read_only})
    return item


@pytest.mark.timeout(240)
@pytest.mark.parametrize("language", LANGUAGES)
def test_example_connects_while_both_certificates_are_renewed(language: str) -> None:
    """The client connects for three lifetimes, so both programs have used at least three certificates."""
    client, server = (Pod(_namespace(language), name) for name in ("client", "server"))
    for pod in (client, server):
        pod.wait_until_ready(90)
    expected = _IDENTITY.get(language, f"hello spiffe://cluster.local/ns/{client.namespace}/sa/default")

    def lines() -> list[str]:
        """Return what the client has printed since its first greeting: the server can start later than the client."""
        printed = client.logs().splitlines()
        return printed[next((n for n, line in enumerate(printed) if line.startswith(expected)), len(printed)) :]

    cluster.wait_until(lines, seconds=60, what="the first greeting")
    begin = time.monotonic()
    # One connection a second, so later tests find most of them made.
    cluster.wait_until(lambda: len(lines()) >= 3 * LIFETIME_S, seconds=180, what="connections for three lifetimes")
    assert [line for line in lines() if not line.startswith(expected)] == []
    assert [pod.restarts() for pod in (client, server)] == [0, 0]
    print(f"{language}: {len(lines())} connections, none failed; waited {time.monotonic() - begin:.0f} s")
