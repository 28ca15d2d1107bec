"""The memory budget of the node's volumes."""

from __future__ import annotations

import contextlib
from typing import cast

import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.spec import MAX_NAMES_BYTES
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.pods import Pod
from csi_driver.node.volumes.budget import DRIVER_MEMORY, MEMORY_LIMIT, VolumeBudget, volume_kib

_FILES = [2_000, 1_000, 300, 1_300, 400, 3_500]  # a volume with an EC key, and the copy of the driver


class _Store:
    """The parts of VolumeStore that the budget needs: every volume has the same files."""

    files = _FILES

    @staticmethod
    def key(volume_id: str) -> str:
        return volume_id

    def file_sizes(self, _volume_id: str) -> tuple[int, list[int]]:
        return 500, self.files


def _budget(store: _Store | None = None) -> VolumeBudget:
    return VolumeBudget(cast("VolumeStore", store or _Store()), MEMORY_LIMIT)


def _pod(namespace: str, number: int = 0) -> Pod:
    return Pod(namespace, f"pod-{number}", f"{namespace}-{number}", "app")


def _fill(budget: VolumeBudget, namespace: str) -> int:
    """Admit volumes of one service account, one for each pod, until one is refused. Return their number."""
    for number in range(100_000):
        pod = _pod(namespace, number)
        try:
            budget.admit(f"{namespace}-{number}", pod)
            budget.resize(f"{namespace}-{number}", pod, 500, _FILES)
        except CertmountError as error:
            assert error.reason is Reason.SHARE_EXCEEDED
            budget.release(f"{namespace}-{number}")
            return number
    raise AssertionError("no volume was refused")


def test_new_volumes_with_long_names_are_counted_before_their_certificates_are_requested() -> None:
    """While the authority is slow, each takes 200 KiB in the driver."""
    budget = _budget()
    for number in range(1000):
        with contextlib.suppress(CertmountError):
            budget.admit(str(number), Pod("web", f"pod-{number}", str(number), f"app-{number}"), MAX_NAMES_BYTES)
    admitted, volume = budget.shares.total, budget.shares.held("pod web/pod-0")
    assert 100 < admitted / volume < 200
    assert volume < volume_kib(500, [MAX_NAMES_BYTES, 2 * MAX_NAMES_BYTES]), "the files need more"


def test_volume_is_counted_in_pages_with_a_reserve_of_one_generation() -> None:
    assert volume_kib(500, _FILES) == 48 + 3 * 4 * 6 + 2 * 4 + 1
    assert volume_kib(4097, [4097]) == 48 + 3 * 8 + 2 * 8 + 16


def test_one_service_account_can_run_250_pods_with_the_default_limit() -> None:
    """250 is the largest number of pods that common distributions support on a node."""
    assert _fill(_budget(), "web") >= 250


def test_tenant_that_uses_its_share_leaves_room_for_others() -> None:
    budget = _budget()
    first = _fill(budget, "attacker")
    assert _fill(budget, "victim") >= first / 4
    assert budget.shares.total * 1024 <= MEMORY_LIMIT - DRIVER_MEMORY


def test_renewal_and_restart_never_fail_and_count() -> None:
    store = _Store()
    budget = _budget(store)
    count = _fill(budget, "web")
    store.files = [size * 3 for size in _FILES]
    for number in range(count):
        budget.measure(f"web-{number}", _pod("web", number))
    assert budget.shares.total == count * volume_kib(500, store.files)
    with pytest.raises(CertmountError, match="ShareExceeded: service account web/app: holds"):
        budget.admit("new", _pod("web", count))
    for number in range(count):
        budget.release(f"web-{number}")
        budget.release(f"web-{number}")
    assert budget.shares.total == 0


def test_volume_without_a_usable_record_counts_for_all_until_it_is_adopted() -> None:
    budget = _budget()
    budget.measure("volume", None)
    assert budget.shares.total == volume_kib(500, _FILES)
    budget.measure("volume", _pod("web"))
    assert budget.shares.held("namespace web") == budget.shares.total == volume_kib(500, _FILES)


def test_memory_limit_that_is_too_small_is_rejected() -> None:
    with pytest.raises(CertmountError, match="--memory-limit: is 1000 bytes; use at least 134217728"):
        VolumeBudget(cast("VolumeStore", _Store()), 1000)


def test_volume_whose_next_renewal_does_not_fit_is_refused() -> None:
    """Else the pod starts, and its certificate expires."""
    budget = _budget()
    budget.resize("volume", _pod("web"), 500, [4096] * 127)
    with pytest.raises(CertmountError) as raised:
        budget.resize("volume", _pod("web"), 500, [4096] * 128)
    words = (
        "needs 1032 KiB for its files and those of the next renewal; 1024 KiB fit; use fewer federations or fewer files"
    )
    assert str(raised.value) == f"NoSpace: volume: {words}"
