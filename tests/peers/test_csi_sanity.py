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
        require_program("csi-sanity"), f"-csi.endpoint={endpoint}", f"-csi.controllerendpoint={controller}",
        f"-csi.mountdir={mount_dir}", f"-csi.stagingdir={node.directory / 'staging'}",
        "-ginkgo.focus=Identity Service|Node Service", "-ginkgo.no-color", f"-ginkgo.junit-report={report}", *flags,
    ]  # fmt: skip
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-20_000:]
    return {service: _outcome(report, service) for service in ("Identity", "Node")}


def _outcome(report: Path, service: str) -> Outcome:
    passed, skipped, start = set(), {}, f"[It] {service} Service "
    for case in ET.parse(report).iter("testcase"):  # noqa: S314  # our own process wrote it
        full, status, skip = case.get("name", ""), case.get("status"), case.find("skipped")
        name = full.removeprefix(start)
        if full.startswith(start) and status == "passed":
            passed.add(name)
        elif full.startswith(start):
            assert skip is not None, f"{name}: {status}"
            skipped[name] = skip.get("message", "").removeprefix("skipped").removeprefix(" - ")
    return Outcome(frozenset(passed), skipped)


SETUPS = {
    "called like the kubelet": ({}, 17),  # only tests of features that the driver does not advertise are skipped
    "called directly": (NEEDS_A_CONTROLLER | dict.fromkeys(NEEDS_READ_ONLY, ""), 12),
}


@pytest.mark.parametrize("setup", SETUPS)
async def test_driver_passes(
    setup: str, node: Node, controller: SanityController, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped, passed = SETUPS[setup]
    node.script.issued.clear()
    if setup == "called directly":
        flags = [f"-ginkgo.skip={name}" for name in sorted(NEEDS_READ_ONLY)]
        outcomes = await _run(node, f"unix:{node.kubelet.socket}", controller.address, *flags)
    else:
        outcomes = await _run(node, controller.address, controller.address)
        assert {*NEEDS_A_CONTROLLER, *NEEDS_READ_ONLY} < outcomes["Node"].passed
        assert len(node.script.issued) == 5, "one certificate for each volume, even if it is published repeatedly"
    with capsys.disabled():
        print(f"\ncsi-sanity, {setup}:")
        for service, outcome in outcomes.items():
            for name in sorted(outcome.passed):
                print(f"  passed   {service}: {name}")
            for name, reason in sorted(outcome.skipped.items()):
                print(f"  skipped  {service}: {name} ({reason or 'needs readonly, which csi-sanity cannot set'})")
    assert (len(outcomes["Identity"].passed), outcomes["Identity"].skipped) == (3, {})
    assert (len(outcomes["Node"].passed), dict(outcomes["Node"].skipped)) == (passed, NOT_SUPPORTED | skipped)
    assert list(node.volumes.iterdir()) == []
    assert node.mounts(node.kubelet.root) == []
