"""csi-sanity, the conformance test of the CSI community, with the running driver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import pytest_asyncio

from tests.integration.node.world import Node, running_node
from tests.support.kubelet import FakePod
from tests.support.requirements import require_program
from tests.support.sanity_controller import SanityController

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.peers("csi-sanity")]


_STAGING = "NodeStageVolume not supported"
_UNSTAGING = "NodeUnstageVolume not supported"
_EXPANSION = "NodeExpandVolume not supported"

NOT_SUPPORTED = {
    "NodePublishVolume with single node multi writer capability should fail when volume with single node single writer "
    "access mode is already mounted at a different target path": "Service does not have single node multi writer capability",
    "NodeStageVolume should fail when no volume id is provided": _STAGING,
    "NodeStageVolume should fail when no staging target path is provided": _STAGING,
    "NodeStageVolume should fail when no volume capability is provided": _STAGING,
    "NodeUnstageVolume should fail when no volume id is provided": _UNSTAGING,
    "NodeUnstageVolume should fail when no staging target path is provided": _UNSTAGING,
    "NodeExpandVolume should fail when no volume id is provided": _EXPANSION,
    "NodeExpandVolume should fail when no volume path is provided": _EXPANSION,
    "NodeExpandVolume should fail when volume is not found": _EXPANSION,
    "NodeExpandVolume should work if node-expand is called after node-publish": _EXPANSION,
    "NodeGetStorageHealth should return appropriate response": "NodeGetStorageHealth not supported",
}
"""Certificates need no staging, expansion or second writer, so the driver does not advertise them."""

NEEDS_A_CONTROLLER = dict.fromkeys(
    ["should work", "should be idempotent"], "Controller Service not provided: CreateVolume not supported"
)
NEEDS_READ_ONLY = {
    "NodeUnpublishVolume should remove target path",
    "NodeGetVolumeStats should fail when volume does not exist on the specified path",
    "NodeGetVolumeHealth should return health for a valid volume",
}
"""They publish volumes without ``readonly``, which csi-sanity cannot set and the driver requires."""


@dataclass(frozen=True)
class Outcome:
    """The results of the tests of one service by name."""

    passed: frozenset[str]
    skipped: Mapping[str, str]
    """With the reason of csi-sanity, or nothing if we excluded the test."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node() -> AsyncIterator[Node]:
    async with running_node() as node:
        yield node


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def controller(node: Node) -> AsyncIterator[SanityController]:
    def context() -> Mapping[str, str]:
        return node.kubelet.publish_request(_POD).volume_context

    async with SanityController(node.directory / "sanity.sock", node.channel, context) as controller:
        yield controller


_POD = FakePod()


async def _run(node: Node, endpoint: str, controller: str, *flags: str) -> dict[str, Outcome]:
    """Run the tests of the Identity and Node services, which must pass. Return the results by service."""
    mount_dir = node.kubelet.target(_POD).parent
    mount_dir.rmdir()  # csi-sanity creates it
    report = node.directory / "sanity.xml"
    command = [
        require_program("csi-sanity"),
        f"-csi.endpoint={endpoint}",
        f"-csi.controllerendpoint={controller}",
        f"-csi.mountdir={mount_dir}",
        f"-csi.stagingdir={node.directory / 'staging'}",
        "-ginkgo.focus=Identity Service|Node Service",
        "-ginkgo.no-color",
        f"-ginkgo.junit-report={report}",
        *flags,
    ]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-20_000:]
    return {service: _outcome(report, service) for service in ("Identity", "Node")}


def _outcome(report: Path, service: str) -> Outcome:
    passed, skipped, start = set(), {}, f"[It] {service} Service "
    for case in ET.parse(report).iter("testcase"):  # noqa: S314  # our own process wrote it
        full, status, skip = case.get("name", ""), case.get("status"), case.find("skipped")
        if not full.startswith(start):
            continue
        name = full.removeprefix(start)
        if status == "passed":
            passed.add(name)
        else:
            assert skip is not None, f"{name}: {status}"
            skipped[name] = skip.get("message", "").removeprefix("skipped").removeprefix(" - ")
    return Outcome(frozenset(passed), skipped)


def _print(capsys: pytest.CaptureFixture[str], setup: str, outcomes: Mapping[str, Outcome]) -> None:
    """Print the results, even if the test passes."""
    with capsys.disabled():
        print(f"\ncsi-sanity, {setup}:")
        for service, outcome in outcomes.items():
            for name in sorted(outcome.passed):
                print(f"  passed   {service}: {name}")
            for name, reason in sorted(outcome.skipped.items()):
                print(f"  skipped  {service}: {name} ({reason or 'needs readonly, which csi-sanity cannot set'})")


def _is_clean(node: Node) -> bool:
    return list(node.volumes.iterdir()) == [] and node.mounts(node.kubelet.root) == []


async def test_driver_passes_when_called_like_the_kubelet(
    node: Node, controller: SanityController, capsys: pytest.CaptureFixture[str]
) -> None:
    """Volumes are published. Only tests of features that the driver does not advertise are skipped."""
    node.script.issued.clear()
    outcomes = await _run(node, controller.address, controller.address)
    _print(capsys, "called like the kubelet", outcomes)
    assert len(outcomes["Identity"].passed) == 3
    assert outcomes["Identity"].skipped == {}
    assert dict(outcomes["Node"].skipped) == NOT_SUPPORTED
    assert {*NEEDS_A_CONTROLLER, *NEEDS_READ_ONLY} < outcomes["Node"].passed
    assert len(outcomes["Node"].passed) == 16
    assert len(node.script.issued) == 5, "one certificate for each volume, even if it is published repeatedly"
    assert _is_clean(node)


async def test_driver_passes_when_called_directly(
    node: Node, controller: SanityController, capsys: pytest.CaptureFixture[str]
) -> None:
    """All tests that do not need ``readonly``."""
    flags = [f"-ginkgo.skip={name}" for name in sorted(NEEDS_READ_ONLY)]
    outcomes = await _run(node, f"unix:{node.kubelet.socket}", controller.address, *flags)
    _print(capsys, "called directly", outcomes)
    assert len(outcomes["Identity"].passed) == 3
    assert outcomes["Identity"].skipped == {}
    assert dict(outcomes["Node"].skipped) == NOT_SUPPORTED | NEEDS_A_CONTROLLER | dict.fromkeys(NEEDS_READ_ONLY, "")
    assert len(outcomes["Node"].passed) == 11
    assert _is_clean(node)
