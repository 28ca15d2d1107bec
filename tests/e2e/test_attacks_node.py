"""A tenant floods a node with RSA keys or large volumes: the driver stays within its limit, and other pods start."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from csi_driver.node.volumes.budget import MEMORY_LIMIT
from tests.e2e import cluster, host
from tests.e2e.pods import Pod, manifest

ATTACK, VICTIM = "e2e-attack-node", "e2e-attack-node-victim"
RECOVERY_S = 30.0
START_S = 30.0
"""What a pod of the victim may take to start. On a busy machine, pods differ by seconds, so the times are only printed."""
_MIB = 1024 * 1024


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    cluster.create_namespace(ATTACK)
    cluster.create_namespace(VICTIM)
    yield
    cluster.delete_namespace(ATTACK, VICTIM)


def _flood(name: str, pods: int, volumes: int, attributes: Mapping[str, str]) -> None:
    """Create pods with many volumes. ``kubectl apply`` would store each a second time in an annotation."""
    items = []
    for number in range(pods):
        pod = manifest(Pod(ATTACK, f"{name}-{number}"), attributes)
        (container,), (volume,) = pod["spec"]["containers"], pod["spec"]["volumes"]
        (mount,) = container["volumeMounts"]  # the kubelet publishes only what a container mounts
        for other in (f"-{number}" for number in range(1, volumes)):
            pod["spec"]["volumes"].append(volume | {"name": volume["name"] + other})
            mounted = {"name": mount["name"] + other, "mountPath": mount["mountPath"] + other}
            container["volumeMounts"].append(mount | mounted)
        items.append(pod)
    cluster.kubectl("create", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))


def _publish_seconds(name: str) -> float:
    """Return the seconds until a new pod of the victim is ready."""
    pod, start = Pod(VICTIM, name), time.monotonic()
    cluster.apply(manifest(pod, {}))
    pod.wait_until_ready(60)
    seconds = time.monotonic() - start
    pod.delete("--wait=false")
    return seconds


def _memory_mib(driver: Any) -> float:
    """Return what counts towards the driver's limit: its process, and the files of all volumes."""
    status = Path(f"/proc/{host.process_of(driver)}/status").read_text(encoding="ascii")
    files = 0
    for directory in host.VOLUMES.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a volume can be removed meanwhile
            usage = os.statvfs(directory)
            files += (usage.f_blocks - usage.f_bfree) * usage.f_frsize
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024 + files / _MIB


def _assert_recovery(driver: Any) -> None:
    """Delete the flood. The attacker's next pod and the victim's start within 30 s, and the driver was never restarted."""
    cluster.kubectl("-n", ATTACK, "delete", "pods", "--all", seconds=180)
    start, pod = time.monotonic(), Pod(ATTACK, "after")
    cluster.apply(manifest(pod, {}))
    pod.wait_until_ready(RECOVERY_S)
    _publish_seconds("after")
    assert time.monotonic() - start < RECOVERY_S
    pod.delete("--wait=false")
    assert host.driver()["metadata"]["uid"] == driver["metadata"]["uid"]
    assert host.restarts(host.driver()) == host.restarts(driver)


@pytest.mark.timeout(600)
def test_flood_of_rsa_keys_does_not_delay_other_pods() -> None:
    driver, quiet_s, before = host.driver(), _publish_seconds("quiet-keys"), len(list(host.VOLUMES.iterdir()))
    _flood("rsa", 4, 50, {"key-type": "RSA-4096"})
    cluster.wait_until(
        lambda: len(list(host.VOLUMES.iterdir())) > before + 2, seconds=60, what="the first volumes of the flood"
    )
    during_s, memory_mib = max(_publish_seconds(f"beside-{number}") for number in range(5)), _memory_mib(driver)
    print(f"victim {during_s:.1f} s (quiet {quiet_s:.1f} s); driver and files {memory_mib:.0f} MiB")
    assert during_s < START_S
    assert memory_mib < MEMORY_LIMIT / _MIB
    _assert_recovery(driver)


def _allow_many_names() -> None:
    match = {"namespaces": [ATTACK], "serviceAccounts": ["default"]}
    rule = {"match": match, "allow": {"dns": ["*.large.example.com"]}}
    cluster.change_policy(lambda policy: policy["policy"].append(rule))
    cluster.restart_authority()


@pytest.mark.timeout(600)
def test_large_volumes_of_one_tenant_do_not_use_up_the_memory_of_the_driver() -> None:
    with cluster.restored_configuration():
        _allow_many_names()
        driver, quiet_s = host.driver(), _publish_seconds("quiet-memory")
        names = ", ".join(f"{'a' * 50}{number}.large.example.com" for number in range(100))
        _flood("large", 10, 25, {"dns-names": names})

        def refusals() -> list[str]:
            events = cluster.find("events", "--field-selector", "reason=FailedMount", namespace=ATTACK)
            return [str(event["message"]) for event in events if "ShareExceeded" in str(event["message"])]

        refused = cluster.wait_until(refusals, seconds=120, what="a volume beyond the share is refused")
        assert all(ATTACK in message and "KiB for volumes on this node" in message for message in refused), refused
        during_s, memory_mib = (
            max(_publish_seconds(f"beside-large-{number}") for number in range(5)),
            _memory_mib(driver),
        )
        volumes = len(list(host.VOLUMES.iterdir()))
        print(
            f"victim {during_s:.1f} s (quiet {quiet_s:.1f} s) beside {volumes} volumes; driver and files {memory_mib:.0f} MiB"
        )
        assert volumes > 50
        failed = cluster.find("events", "--field-selector", "reason=FailedMount", namespace=VICTIM)
        assert [event["message"] for event in failed] == []
        assert during_s < START_S
        assert memory_mib < MEMORY_LIMIT / _MIB
        _assert_recovery(driver)
