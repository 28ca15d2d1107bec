"""Measures the authority's policy, caches, events and watchers in this process."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator

from prometheus_client import CollectorRegistry

from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import Policy, PolicySubject, RequestedCertificate
from csi_driver.core.spec import MAX_NAMES
from csi_driver.events.aggregator import EventAggregator
from csi_driver.kube.object_caches import PodCache
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.bench.growth.series import fastest_us, growth
from tests.bench.known_pods import store_pods
from tests.bench.table import Figure
from tests.bench.world import WrongResultError

_RULES = (10, 100, 1000)
_ACCOUNTS = (1000, 4000, 4500, 8000)
_PODS = (1000, 10_000, 100_000)
_EVENTS = (10, 100, 1000)
_WATCHERS = (10, 100, 1000, 10_000)
_DECISIONS = 400
_REFUSALS = 20
_LOOKUPS = 10_000
_CACHE_FACTOR = 4.0
_UUID = "11111111-1111-4111-8111-{:012}"


async def measure_structures() -> list[Figure]:
    return [*_policy(), *_pods(), _events(), await _watchers()]


def _policy() -> Iterator[Figure]:
    """Yield the cost of decisions. Each account asks once, so that no decision is remembered, unless the row says so."""
    shapes = {"of a namespace each": "team-{0}", "with a prefix each": "team-{0}-*"}
    for shape, namespace in shapes.items():
        costs = {count: _first_decisions(_rules(count, namespace), "team-{0}-x") for count in _RULES}
        name = f"policy: first decision for an account, by rules {shape}"
        yield growth(name, costs, "us", f"CPU time, {_DECISIONS} accounts in as many namespaces")
    for shape, count in (("for all namespaces", 0), ("in the deny list", 1)):
        policies = {size: _denials(size) if count else _rules(size, "*", "app-{0}") for size in _RULES}
        costs = {size: _first_decisions(policy, "team-{0}") / size for size, policy in policies.items()}
        name = f"policy: first decision for an account, per rule {shape}"
        yield growth(name, costs, "us", f"CPU time divided by the rules, {_DECISIONS} accounts; must not grow")
    costs = {count: _refused_names(count) for count in _RULES}
    method = f"CPU time per name, {MAX_NAMES} names in a request that no pattern allows"
    yield growth("policy: refused name, by patterns of a rule", costs, "us", method)
    policy = _rules(1000, "team-{0}")
    costs = {count: _repeated_decisions(policy, count) for count in _ACCOUNTS}
    method = "CPU time per decision of 1,000 rules; all accounts ask in turn. The cache has 4,096 places"
    yield growth("policy: decision, by accounts", costs, "us", method, factor=_CACHE_FACTOR)


def _rules(count: int, namespace: str, account: str = "*") -> Policy:
    rules = [
        {
            "match": {"namespaces": [namespace.format(number)], "serviceAccounts": [account.format(number)]},
            "allow": {"dns": [f"*.team-{number}.example.com"]},
        }
        for number in range(count)
    ]
    return parse_policy({"policy": rules}, trust_domain="example.org", cluster_domain="cluster.local")


def _denials(count: int) -> Policy:
    entries = [
        {"match": {"namespaces": ["*"], "serviceAccounts": [f"app-{number}"]}, "reason": "moved"}
        for number in range(count)
    ]
    return parse_policy({"deny": entries}, trust_domain="example.org", cluster_domain="cluster.local")


def _subject(namespace: str, account: str) -> PolicySubject:
    owner = ServiceAccount(namespace, account)
    return PolicySubject(PodIdentity(owner, _UUID.format(1), "p", _UUID.format(2), "n", _UUID.format(3), 0.0))


def _first_decisions(policy: Policy, namespace: str) -> float:
    rounds = iter(range(1000))

    def decide() -> int:
        turn = next(rounds)
        for number in range(_DECISIONS):
            policy.decide(_subject(namespace.format(number), f"web-{turn}"), RequestedCertificate())
        return _DECISIONS

    return fastest_us(decide)


def _refused_names(patterns: int) -> float:
    match = {"namespaces": ["*"], "serviceAccounts": ["*"]}
    rule = {"match": match, "allow": {"dns": [f"*.team-{number}.example.com" for number in range(patterns)]}}
    policy = parse_policy({"policy": [rule]}, trust_domain="example.org", cluster_domain="cluster.local")
    names = Names.of(DNSName.parse(f"www.other-{number}.example.com") for number in range(MAX_NAMES))

    def decide() -> int:
        for _ in range(_REFUSALS):
            with contextlib.suppress(CertmountError):
                policy.decide(_subject("web", "edge"), RequestedCertificate(names))
        return _REFUSALS * MAX_NAMES

    return fastest_us(decide)


def _repeated_decisions(policy: Policy, accounts: int) -> float:
    subjects = [_subject(f"team-{number % 1000}", f"web-{number}") for number in range(accounts)]

    def decide() -> int:
        for subject in subjects:
            policy.decide(subject, RequestedCertificate())
        return accounts

    decide()
    return fastest_us(decide)


def _pods() -> Iterator[Figure]:
    stored, found = {}, {}
    for count in _PODS:
        result = store_pods(count, stateful=False)
        stored[count] = result.us
        pods, keys = result.pods, [str(uuid.UUID(int=number % count)) for number in range(_LOOKUPS)]

        def find(cache: PodCache = pods, uids: list[str] = keys) -> int:
            for uid in uids:
                if cache.find(uid) is None:
                    raise WrongResultError(f"pod {uid} is not in the cache")
            return len(uids)

        found[count] = fastest_us(find)
    yield growth("known pods: parse and store one", stored, "us", "CPU time, in pages of 500")
    yield growth("known pods: look one up", found, "us", f"CPU time of {_LOOKUPS} lookups")


def _events() -> Figure:
    def write(count: int) -> int:
        """Add events of as many pods, and take each one; 2,000 is the limit of the table, and one owner gets half."""
        events, now = EventAggregator(lambda _cause: None), 0.0
        for number in range(count):
            target = EventTarget(f"team-{number % 7}", f"pod-{number}", _UUID.format(number))
            events.add(target, (), warning=True, reason="R", message="m", now=now, at=now)
        for _ in range(count):
            now += 0.05
            event = events.take(now)
            assert event is not None
        return count

    repeats = {count: max(1, 1000 // count) for count in _EVENTS}
    costs = {count: fastest_us(lambda: sum(write(count) for _ in range(repeats[count]))) for count in _EVENTS}  # noqa: B023
    return growth("events: add and take one", costs, "us", "CPU time; the events are of pods in seven namespaces")


async def _watchers() -> Figure:
    costs = {}
    for count in _WATCHERS:
        trust = TrustBundles(AuthorityMetrics(CollectorRegistry()))
        trust.set_roots("internal", RootSet((b"root",), 1))
        start = time.process_time()
        async with contextlib.AsyncExitStack() as stack:
            for number in range(count):
                watch = await stack.enter_async_context(contextlib.aclosing(trust.watch(f"node-{number}")))
                await anext(watch)
        costs[count] = (time.process_time() - start) / count * 1e6
    return growth("trust watchers: one connects and leaves", costs, "us", "CPU time without gRPC")
