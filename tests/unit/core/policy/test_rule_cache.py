"""The cache of the rules that match each service account."""

from __future__ import annotations

import time

from csi_driver.core.policy.engine import RequestedCertificate
from csi_driver.core.policy.rule_cache import MAX_CACHED_ACCOUNTS, MAX_CACHED_PER_NAMESPACE, RuleCache
from tests.unit.core.pki import names
from tests.unit.core.policy.policies import policy, rule_for_all, subject
from tests.unit.core.policy.reference import Entry, Pod

VALUE = (names("spiffe://a/b").uris[0], ())


def test_namespace_cannot_displace_more_than_its_share() -> None:
    cache = RuleCache()
    for number in range(MAX_CACHED_ACCOUNTS - MAX_CACHED_PER_NAMESPACE):
        cache.put((f"ns-{number % 100}", f"sa-{number}"), VALUE)
    before = len(cache)
    for number in range(10_000):
        cache.put(("tenant", f"sa-{number}"), VALUE)
    assert len(cache) == before + MAX_CACHED_PER_NAMESPACE == MAX_CACHED_ACCOUNTS
    assert all(cache.get((f"ns-{number % 100}", f"sa-{number}")) for number in range(before))
    assert cache.get(("tenant", "sa-9999"))
    assert cache.get(("tenant", "sa-0")) is None


def test_full_cache_drops_the_entry_that_is_unused_for_longest() -> None:
    cache = RuleCache()
    for number in range(MAX_CACHED_ACCOUNTS):
        cache.put((f"ns-{number}", "sa"), VALUE)
    assert cache.get(("ns-0", "sa"))
    cache.put(("new", "sa"), VALUE)
    assert len(cache) == MAX_CACHED_ACCOUNTS
    assert cache.get(("ns-1", "sa")) is None
    assert cache.get(("ns-0", "sa"))


def test_other_accounts_stay_fast_while_a_tenant_creates_service_accounts() -> None:
    rules = policy(*[Entry(("a", "b-*", "c"), ("x*", "y"), names=("x.example",))] * 999, rule_for_all("v.example"))
    victims = [subject(Pod(f"team-{number}", "web", "p")) for number in range(200)]
    ask = RequestedCertificate(names("v.example"))

    def fastest_round() -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            for victim in victims:
                rules.decide(victim, ask)
            times.append(time.process_time() - start)
        return min(times)

    fastest_round()
    quiet = fastest_round()
    for number in range(5000):
        rules.decide(subject(Pod("tenant", f"sa-{number}", "p")), RequestedCertificate())
    attacked = fastest_round()
    print(f"{quiet / 200 * 1e6:.0f} µs before, {attacked / 200 * 1e6:.0f} µs after 5,000 accounts of a tenant")
    assert attacked < 3 * quiet
    assert len(rules._cache) <= MAX_CACHED_ACCOUNTS
