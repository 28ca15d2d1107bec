"""Publish calls that the kubelet cancels."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import pytest

from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.spec import DEFAULT_KEY_TYPE
from csi_driver.host.directory_mounts import DirectoryMounts
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.log_shares import PodLogShares
from csi_driver.node.publishing.publish import Publisher
from csi_driver.node.publishing.publish_request import PublishRequest
from csi_driver.node.renewal.reloads import ReloadRules
from csi_driver.node.volumes.volume import VolumeTable
from tests.support.scripted_authority import TestCA
from tests.support.waiting import until
from tests.unit.host.samples import VOLUME_ID
from tests.unit.node.certificates import pod_named


class SlowMounts(DirectoryMounts):
    """Binds after ``proceed`` is set."""

    def __init__(self) -> None:
        self.binding, self.proceed = threading.Event(), threading.Event()

    def bind_read_only(self, source: Path, target: Path) -> None:
        self.binding.set()
        assert self.proceed.wait(20)
        super().bind_read_only(source, target)


class World:
    """A publisher of a volume with only roots."""

    def __init__(self, kubelet_dir: Path, attributes: Mapping[str, str] = MappingProxyType({})) -> None:
        self.mounts, self.roots, self.budget = SlowMounts(), mock.AsyncMock(), mock.Mock()
        self.roots.select = mock.Mock(return_value={"internal": RootSet((TestCA().der,), 1)})
        pod = pod_named("shop-0")
        self.target = kubelet_dir / "pods" / pod.uid / "volumes" / "kubernetes.io~csi" / "tls" / "mount"
        self.target.parent.mkdir(parents=True)
        store = VolumeStore(kubelet_dir / "volumes", kubelet_dir, self.mounts)
        published, restorer, certificates, renewals = (mock.Mock() for _ in range(4))
        renewals.clock.return_value = 1_800_000_000.0
        publisher = Publisher(
            kubelet_dir, "node1", store, VolumeTable(), published, restorer, certificates, self.roots, renewals,
            self.budget, ReloadRules(), DEFAULT_KEY_TYPE, PodLogShares(),
        )  # fmt: skip
        attributes = {"root-only": "true", **attributes}
        request = PublishRequest(VOLUME_ID, str(self.target), pod, attributes, {}, None, None, {})
        self.call = asyncio.create_task(publisher._publish_first(request))

    async def cancel(self) -> None:
        """Cancel the call, as the kubelet does after two minutes."""
        self.call.cancel()
        await asyncio.sleep(0)
        self.mounts.proceed.set()
        with pytest.raises(asyncio.CancelledError):
            await self.call


async def test_publish_that_is_cancelled_while_it_binds_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    await until(world.mounts.binding.is_set, "the bind")
    await world.cancel()
    assert list(world.target.parent.iterdir()) == []
    assert list((tmp_path / "volumes").iterdir()) == []
    world.budget.release.assert_called_once_with(VOLUME_ID)


async def test_publish_that_is_cancelled_at_its_end_leaves_the_whole_volume(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.mounts.proceed.set()
    world.roots.catch_up = mock.Mock(side_effect=lambda _volume: asyncio.sleep(3600))
    await until(lambda: world.roots.catch_up.called, "the published volume")
    await world.cancel()
    assert (world.target / "root.crt").exists()
    world.budget.release.assert_not_called()


async def test_publish_that_is_cancelled_after_its_failure_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, {"truststore-file": "roots.p12"})  # its rendering takes a thread
    mounting, make_tmpfs = threading.Event(), world.mounts.make_tmpfs

    def mount_slowly(point: Path, size_bytes: int, inodes: int) -> None:
        mounting.set()
        assert world.mounts.proceed.wait(20)
        make_tmpfs(point, size_bytes, inodes)

    def refuse(*_: object) -> None:
        assert mounting.wait(20)
        raise CertmountError(Reason.SHARE_EXCEEDED, "no memory")

    world.budget.resize.side_effect = refuse
    with mock.patch.object(world.mounts, "make_tmpfs", mount_slowly):
        await until(lambda: world.budget.resize.called, "the failure")
        await world.cancel()
    assert list((tmp_path / "volumes").glob("*")) == []
    world.budget.release.assert_called_once_with(VOLUME_ID)
