"""When signals are sent, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from unittest import mock

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.reload import Reload
from csi_driver.core.secret import Secret
from csi_driver.host.pod_processes import PodProcesses
from csi_driver.node.authority_messages import CertificateCondition
from csi_driver.node.log_shares import PodLogShares
from csi_driver.node.pods import PodToken
from csi_driver.node.renewal import reloads
from csi_driver.node.renewal.certificate_reports import CertificateReporter
from csi_driver.node.renewal.reloads import ReloadRules, Reloads, parse_namespaces
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.telemetry.node_metrics import NodeMetrics
from tests.support.waiting import in_background
from tests.unit.host.samples import record
from tests.unit.node.virtual_time import run_virtually

SPEC = parse_attributes({"reload": "signal=HUP,process=nginx"})
CLAIMS = PodIdentity(ServiceAccount("web", "shop"), "", "shop-0", "uid", "node1", "", 1.0)


class World:
    """Volumes whose pods have a process each. A search in a pod takes a second."""

    def __init__(self, *namespaces: str) -> None:
        self.volumes = VolumeTable()
        self.signals: list[tuple[float, str]] = []
        self.reporter = mock.create_autospec(CertificateReporter, instance=True)
        self.failure: Exception | None = None
        self._namespaces = namespaces or ("*",)

    def volume(self, name: str, namespace: str = "web", *, reload: bool = True) -> Volume:
        spec = SPEC if reload else parse_attributes({})
        fields = {"volume_id": name, "pod_name": name, "pod_uid": name, "pod_namespace": namespace}
        volume = Volume(record(**fields), spec, PodToken(Secret("token"), CLAIMS))
        self.volumes.keep(volume)
        return volume

    def run(self, *steps: tuple[float, Callable[[], None]], until: float = 600) -> list[tuple[float, str]]:
        """Run the steps at their times; return the time and the pod of each signal."""

        async def scenario() -> None:
            loop = asyncio.get_running_loop()

            async def in_thread(_executor: None, _signal: object, uid: str, _reload: Reload) -> int:
                await asyncio.sleep(1)
                if self.failure is not None:
                    raise self.failure
                self.signals.append((round(loop.time(), 3), uid))
                return 1

            rules = ReloadRules(self._namespaces, PodProcesses())
            metrics = NodeMetrics(CollectorRegistry())
            found = Reloads(rules, self.volumes, self.reporter, metrics, PodLogShares(), loop.time)
            found._scheduler.elapsed = loop.time
            for at, step in steps:
                loop.call_later(at, step)
            with mock.patch.object(reloads, "in_thread", in_thread):
                async with in_background(found.run()):
                    await asyncio.sleep(until)

        run_virtually(scenario())
        return self.signals

    def replaced(self, volume: Volume, at: float) -> tuple[float, Callable[[], None]]:
        return at, lambda: self.volumes.files_replaced(volume)


def test_replacements_within_a_second_cause_one_signal() -> None:
    world = World()
    volume = world.volume("a")
    steps = [world.replaced(volume, at) for at in (10.0, 10.1, 10.9, 30.0)]
    assert world.run(*steps) == [(12.0, "a"), (32.0, "a")]


def test_replacement_during_a_signal_causes_another() -> None:
    world = World()
    volume = world.volume("a")
    assert world.run(world.replaced(volume, 10.0), world.replaced(volume, 11.5)) == [(12.0, "a"), (13.5, "a")]


def test_volume_without_the_attribute_causes_none() -> None:
    world = World()
    assert world.run(world.replaced(world.volume("a", reload=False), 10.0)) == []


@pytest.mark.parametrize("until", [10.5, 11.5, 12.5], ids=["delayed", "in progress", "waiting"])
def test_driver_that_stops_sends_the_remaining_signals(until: float) -> None:
    world = World()
    steps = [world.replaced(world.volume(name), at) for name, at in (("a", 10.0), ("b", 10.3))]
    assert {pod for _, pod in world.run(*steps, until=until)} == {"a", "b"}


def test_driver_that_stops_does_not_wait_long_for_signals() -> None:
    """The kubelet kills the driver after its grace period."""
    world = World()
    steps = [world.replaced(world.volume(str(number)), 10.0) for number in range(100)]
    assert max(at for at, _ in world.run(*steps, until=20.0)) < 26


@pytest.mark.parametrize("at", [10.5, 15.0], ids=["delayed", "waiting"])
def test_removed_volume_causes_none(at: float) -> None:
    world = World()
    others = [world.replaced(world.volume(f"other-{number}"), 10.0) for number in range(10)]
    volume = world.volume("z")
    signals = world.run(*others, world.replaced(volume, 10.0), (at, lambda: world.volumes.forget("z")))
    assert sorted(pod for _, pod in signals) == sorted(f"other-{number}" for number in range(10))


def test_namespace_with_many_signals_does_not_delay_those_of_others() -> None:
    world = World()
    flood = [world.replaced(world.volume(f"flood-{number}", "flood"), 10.0) for number in range(200)]
    signals = world.run(*flood, world.replaced(world.volume("victim", "victim"), 50.0))
    assert 51 < next(at for at, pod in signals if pod == "victim") < 54


@pytest.mark.parametrize(
    "failure, reason",
    [
        (CertmountError(Reason.RELOAD_FAILED, "no such process"), "ReloadFailed"),
        (RuntimeError("a defect"), "InternalError"),
    ],
)
def test_failure_is_reported_and_does_not_stop_others(failure: Exception, reason: str) -> None:
    world = World()
    failing, other = world.volume("a"), world.volume("b")
    world.failure = failure

    def repair() -> None:
        world.failure = None

    assert world.run(world.replaced(failing, 10.0), (20.0, repair), world.replaced(other, 20.0)) == [(22.0, "b")]
    (call,) = world.reporter.report.call_args_list
    assert call.args[0] == "a"
    assert call.args[2:4] == (CertificateCondition.RELOAD_FAILED, reason)
    assert call.args[4].startswith(f"the files were replaced, but the signal failed: {reason}: ")


def test_namespace_that_is_no_longer_allowed_is_reported() -> None:
    world = World("shop")
    assert world.run(world.replaced(world.volume("a"), 10.0)) == []
    assert world.reporter.report.call_args.args[3] == "ReloadNotAllowed"


@pytest.mark.parametrize(
    "text, expected", [("", ()), (" ", ()), ("web", ("web",)), ("web, shop", ("web", "shop")), ("*", ("*",))]
)
def test_namespaces_of_the_option(text: str, expected: tuple[str, ...]) -> None:
    assert parse_namespaces(text) == expected


@pytest.mark.parametrize("text", ["web,", "we*", "Web", "web;shop"])
def test_invalid_namespace_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="is not a name; use 1 to 63 lower-case letters"):
        parse_namespaces(text)
