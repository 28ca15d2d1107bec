"""``make chaos``: breaks every part of a cluster in turn while pairs of pods talk mutual TLS, and counts what fails.

``tests/e2e/run chaos`` starts it on a new cluster. The exit status is 1 if anything failed that certmount must prevent.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator

from tests.chaos.background import Churn, PolicyEditor, Rotation
from tests.chaos.clock import Clock
from tests.chaos.faults import FAULTS, Fault, Scene
from tests.chaos.pairs import NAMESPACE, Pairs
from tests.chaos.report import Report
from tests.chaos.round import inflict
from tests.chaos.volumes import VolumeMonitor
from tests.e2e import cluster


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of pods")
    parser.add_argument("--seed", type=int, default=None, help="repeats the order of the faults of an earlier run")
    parser.add_argument("--fault", action="append", choices=[fault.name for fault in FAULTS], help="only this fault")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"SEED={seed} PAIRS={arguments.pairs} MINUTES={arguments.minutes:g}", flush=True)
    faults = [fault for fault in FAULTS if not arguments.fault or fault.name in arguments.fault]
    report = _run(arguments.minutes * 60, arguments.pairs, seed, faults)
    report.print()
    sys.exit(1 if report.failed else 0)


def _run(seconds: float, pairs: int, seed: int, faults: list[Fault]) -> Report:
    rng = _rng(seed)
    volumes, policy, clock = VolumeMonitor(), PolicyEditor(_rng(rng.random())), Clock()
    scene = Scene(Pairs(pairs), volumes, policy, clock, rng)
    churn, rotation = Churn(_rng(rng.random()), volumes), Rotation(_rng(rng.random()))
    cluster.create_namespace(NAMESPACE)
    clock.install()
    policy.allow()
    scene.pairs.start()
    for pod, uid in scene.pairs.uids.items():
        volumes.watch(pod, uid)
    report = Report(scene, churn, rotation)
    threads = (volumes, churn, rotation, policy)
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + seconds
        for fault in _order(faults, rng):
            if time.monotonic() > deadline:
                break
            one = inflict(fault, scene, churn)
            report.add(one)
            if one.recovered is None:
                print("stopped: further faults would say nothing about certmount, and change the evidence", flush=True)
                break
    finally:
        for thread in (churn, rotation, policy):
            thread.close()
        try:
            report.clean_up()
        finally:
            volumes.close()
    return report


def _rng(seed: float) -> random.Random:
    return random.Random(seed)  # noqa: S311  # a seed repeats the run


def _order(faults: list[Fault], rng: random.Random) -> Iterator[Fault]:
    """Yield the faults in the order of importance first, then in random order again and again."""
    yield from faults
    while True:
        yield from rng.sample(faults, len(faults))


if __name__ == "__main__":
    main()
