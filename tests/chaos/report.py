"""The result of a run: a row for each fault, the counts, and everything that failed."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from statistics import median

from tests.chaos.background import Churn, Rotation
from tests.chaos.faults import FAULTS, Scene
from tests.chaos.pairs import NAMESPACE, Failure
from tests.chaos.round import Round
from tests.chaos.volumes import keys_on_disk, mounts_of_certmount
from tests.e2e import cluster, host

_MAX_PRINTED = 20


class Report:
    """Collects the rounds; ``clean_up`` deletes all pods and looks for what they left."""

    def __init__(self, scene: Scene, churn: Churn, rotation: Rotation) -> None:
        self.scene = scene
        self.churn = churn
        self.rotation = rotation
        self.rounds: list[Round] = []
        self.leftovers: list[str] = []
        self.restarted: list[str] = []
        self.unfinished = ""

    def add(self, one: Round) -> None:
        self.rounds.append(one)

    def clean_up(self) -> None:
        """Read the last results, delete all pods, and record what is left of them on the host. A failure is a problem."""
        try:
            self._clean_up()
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            gone = "" if host.exists() else "; the cluster is gone, so this run says nothing about certmount"
            self.unfinished = f"the pods were not deleted{gone}: {error}"

    def _clean_up(self) -> None:
        scene = self.scene
        scene.pairs.read()
        for pod, uid in scene.pairs.uids.items():
            if pod.restarts():
                self.restarted.append(f"{pod} restarted")
            scene.volumes.deleting(uid)
        pods = [*scene.pairs.uids.items(), *self.churn.alive]
        for _, uid in pods:
            scene.volumes.deleting(uid)
        cluster.kubectl("-n", NAMESPACE, "delete", "pods", "--all", seconds=180)
        for _, uid in pods:
            scene.volumes.deleted(uid)
        left = scene.volumes.wait_for_removals()
        cluster.kubectl("delete", "namespace", NAMESPACE, seconds=180)
        if not cluster.find("pods", "--all-namespaces", "--field-selector", "metadata.namespace!=certmount"):
            left += [*keys_on_disk(), *mounts_of_certmount()]
        self.leftovers = sorted(set(left))

    @property
    def ours(self) -> list[Failure]:
        return [failure for failure in self.scene.pairs.failures if not failure.cause]

    @property
    def problems(self) -> list[str]:
        """Return all failures except handshakes, volumes and leftovers."""
        threads = (self.churn, self.rotation, self.scene.policy, self.scene.volumes)
        errors = [thread.error for thread in threads if thread.error]
        rounds = [problem for one in self.rounds for problem in one.problems]
        unfinished = [self.unfinished] if self.unfinished else []
        return [*rounds, *self.churn.not_started, *self.restarted, *errors, *unfinished]

    @property
    def failed(self) -> bool:
        return bool(self.ours or self.scene.volumes.lost or self.leftovers or self.problems)

    def print(self) -> None:
        print(f"\n{'':34} {'':>5} {'healthy after, s':>18} {'new pod after, s':>18}   {'failed handshakes'}")
        print(
            f"{'fault':34} {'times':>5} {'median':>9}  {'longest':>7} {'median':>9}  {'longest':>7} {'not ours':>11} {'ours':>6}"
        )
        for fault in FAULTS:
            if rounds := [one for one in self.rounds if one.fault == fault]:
                self._print_row(fault.name, rounds)
        self._print_counts()
        others = [failure for failure in self.scene.pairs.failures if failure.cause]
        _print_list("failed handshakes that are not ours", _grouped(others))
        _print_list("failed handshakes that are ours", _grouped(self.ours))
        _print_list("lost volumes", [f"{since} {text}" for text, since in self.scene.volumes.lost.items()])
        _print_list("left on the node", self.leftovers)
        _print_list("other problems", self.problems)
        print("\nFAILED" if self.failed else "\nPASSED")

    def _print_row(self, name: str, rounds: list[Round]) -> None:
        within = [failure for failure in self.scene.pairs.failures if any(_contains(one, failure) for one in rounds)]
        ours = sum(not failure.cause for failure in within)
        healthy = _spread([one.healthy - one.end for one in rounds if one.healthy])
        recovered = _spread([one.recovered - one.end for one in rounds if one.recovered])
        print(f"{name:34} {len(rounds):5} {healthy} {recovered} {len(within) - ours:11} {ours:6}")

    def _print_counts(self) -> None:
        totals, volumes, policy = self.scene.pairs.totals(), self.scene.volumes, self.scene.policy
        counts = {
            "handshakes": totals["connections"],
            "failed handshakes, not ours": len(self.scene.pairs.failures) - len(self.ours),
            "failed handshakes, ours": len(self.ours),
            "renewals that clients saw": totals["renewals"],
            "checks of a volume on the host": volumes.checks,
            "lost volumes": len(volumes.lost),
            "other pods created and deleted": self.churn.created,
            "pods that did not start": len(self.churn.not_started),
            "volumes removed": volumes.removed,
            "left-over mounts, keys, directories": len(self.leftovers),
            "completed CA rotations": self.rotation.completed,
            "policy edits (of these invalid)": f"{policy.edits} ({policy.rejected})",
        }
        print()
        for name, value in counts.items():
            print(f"{name:36} {value}")
        print(f"{'slowest removal of a volume':36} {volumes.slowest_removal_s:.0f} s")


def _contains(one: Round, failure: Failure) -> bool:
    return one.begin <= failure.time <= (one.recovered or float("inf"))


def _spread(seconds: list[float]) -> str:
    return f"{median(seconds):9.1f}  {max(seconds):7.1f}" if seconds else f"{'never':>18}"


def _grouped(failures: list[Failure]) -> list[str]:
    """Return a line for each kind of failure of a pair, with the first and the last time."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for one in failures:
        groups.setdefault((one.pair, one.cause, one.text), []).append(one.time)
    return [
        f"{_clock(times[0])} to {_clock(times[-1])} {pair}: {len(times)} x {cause or 'certmount'} ({text})"
        for (pair, cause, text), times in groups.items()
    ]


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S")


def _print_list(title: str, lines: list[str]) -> None:
    if lines:
        print(f"\n{title}:")
        for line in lines[:_MAX_PRINTED]:
            print(f"  {line}")
        if len(lines) > _MAX_PRINTED:
            print(f"  and {len(lines) - _MAX_PRINTED} more")
