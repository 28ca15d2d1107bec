"""What the driver does with a volume of an earlier process, in addition to its renewal."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from csi_driver.host.directory_mounts import DirectoryMounts
from csi_driver.host.generations import replaced_at, write_generation
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.publishing.restore import VolumeRestorer
from csi_driver.node.volumes.volume import Volume, VolumeTable
from tests.unit.host.samples import POD_UID, VOLUME_ID, pair, record

RELOAD = {"reload": "signal=HUP,process=nginx"}


@pytest.mark.parametrize(
    "attributes, generations, later_s, signalled",
    [
        (RELOAD, 2, 1.0, True),
        (RELOAD, 2, 500.0, True),
        (RELOAD, 2, -60.0, True),  # the clock was set back
        (RELOAD, 2, 700.0, False),
        (RELOAD, 1, 1.0, False),
        ({}, 2, 1.0, False),
    ],
)
async def test_pod_whose_files_were_replaced_before_the_restart_is_signalled(
    tmp_path: Path, attributes: dict[str, str], generations: int, later_s: float, signalled: bool
) -> None:
    """The earlier process may have ended before it sent the signal. A pod that has its first files needs none."""
    target = tmp_path / "pods" / POD_UID / "volumes" / "kubernetes.io~csi" / "tls" / "mount"
    target.parent.mkdir(parents=True)
    store = VolumeStore(tmp_path / "volumes", tmp_path, DirectoryMounts())
    store.create(VOLUME_ID)
    for number in range(generations):
        write_generation(store.files_dir(VOLUME_ID), pair(number), str(number))
    store.write_record(record(str(target), attributes=attributes))
    now = (replaced_at(store.files_dir(VOLUME_ID)) or 0.0) + later_s
    volumes, replaced = VolumeTable(), list[Volume]()
    volumes.when_replaced(replaced.append)
    roots, renewals, remover, budget, metrics = (mock.Mock() for _ in range(5))
    await VolumeRestorer(
        "node1", store, volumes, roots, renewals, remover, budget, metrics, lambda: now, lambda: 0.0
    ).restore()
    assert len(list(volumes)) == 1
    assert bool(replaced) is signalled
