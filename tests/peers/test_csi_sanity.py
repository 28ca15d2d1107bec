"""csi-sanity, the CSI community's conformance test, against the running driver."""

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

NOT_OFFERED = {
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
"""What the driver does not advertise, as certificates need no staging, expansion or second writer."""

NEEDS_A_CONTROLLER = dict.fromkeys(
    ["should work", "should be idempotent"], "Controller Service not provided: CreateVolume not supported"
)
NEEDS_READ_ONLY = {
    "NodeUnpublishVolume should remove target path",
    "NodeGetVolumeStats should fail when volume does not exist on the specified path",
    "NodeGetVolumeHealth should return health for a valid volume",
}
"""They publish, but csi-sanity has no way to say ``readonly``, without which the driver refuses every volume."""


@dataclass(frozen=True)
class Outcome:
    """How the tests of one service went, by name."""

    passed: frozenset[str]
    skipped: Mapping[str, str]
    """With csi-sanity's reason; empty for those that we asked to leave out."""


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
    """Runs the tests of Identity and Node; fails where one of them does. Outcomes by service."""
    mount_dir = node.kubelet.target(_POD).parent
    mount_dir.rmdir()  # csi-sanity makes it, and the target in it
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
    for case in ET.parse(report).iter("testcase"):  # noqa: S314  # the report of our own child
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


def _tell(capsys: pytest.CaptureFixture[str], how: str, outcomes: Mapping[str, Outcome]) -> None:
    """Shows what passed and what was skipped and why, also when the test passes."""
    with capsys.disabled():
        print(f"\ncsi-sanity, {how}:")
        for service, outcome in outcomes.items():
            for name in sorted(outcome.passed):
                print(f"  passed   {service}: {name}")
            for name, why in sorted(outcome.skipped.items()):
                print(f"  skipped  {service}: {name} ({why or 'needs readonly, which csi-sanity can not say'})")


def _is_clean(node: Node) -> bool:
    return list(node.volumes.iterdir()) == [] and node.mounts(node.kubelet.root) == []


async def test_as_the_kubelet_calls_it(
    node: Node, controller: SanityController, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every Identity and Node test passes, volumes really are published, and only what is not offered is skipped."""
    node.script.issued.clear()
    outcomes = await _run(node, controller.address, controller.address)
    _tell(capsys, "called as the kubelet calls", outcomes)
    assert len(outcomes["Identity"].passed) == 3
    assert outcomes["Identity"].skipped == {}
    assert dict(outcomes["Node"].skipped) == NOT_OFFERED
    assert {*NEEDS_A_CONTROLLER, *NEEDS_READ_ONLY} < outcomes["Node"].passed
    assert len(outcomes["Node"].passed) == 16
    assert len(node.script.issued) == 5, "one certificate for each volume, however often it was published"
    assert _is_clean(node)


async def test_the_driver_itself(node: Node, controller: SanityController, capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing in between, every test passes that can say what the driver needs."""
    flags = [f"-ginkgo.skip={name}" for name in sorted(NEEDS_READ_ONLY)]
    outcomes = await _run(node, f"unix:{node.kubelet.socket}", controller.address, *flags)
    _tell(capsys, "with nothing in between", outcomes)
    assert len(outcomes["Identity"].passed) == 3
    assert outcomes["Identity"].skipped == {}
    assert dict(outcomes["Node"].skipped) == NOT_OFFERED | NEEDS_A_CONTROLLER | dict.fromkeys(NEEDS_READ_ONLY, "")
    assert len(outcomes["Node"].passed) == 11
    assert _is_clean(node)
