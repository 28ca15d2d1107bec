"""The keys that verify tokens, and how often they are fetched."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from prometheus_client import CollectorRegistry

from csi_driver.authority.authn.token_keys import TokenKeys, parse_keys
from csi_driver.core.cluster.objects import PublishedKeys
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import ISSUER, TokenIssuer
from tests.support.waiting import in_background, until
from tests.unit.authority.clock import Clock


def jwks(*entries: Any) -> PublishedKeys:
    return PublishedKeys(ISSUER, json.dumps({"keys": entries}).encode())


class Cluster:
    """Publishes keys once ``gate`` is set."""

    def __init__(self, *issuers: TokenIssuer) -> None:
        self.issuers = issuers
        self.fetches = 0
        self.unavailable = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self) -> PublishedKeys:
        self.fetches += 1
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.unavailable:
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "the API server cannot be reached")
        return jwks(*(issuer.jwk for issuer in self.issuers))


World = tuple[Cluster, Clock, TokenKeys]


@pytest.fixture
async def world(issuer: TokenIssuer, metrics: AuthorityMetrics) -> World:
    cluster, clock = Cluster(issuer), Clock()
    keys = TokenKeys(cluster.fetch, metrics, clock)
    await keys.load()
    return cluster, clock, keys


async def test_new_key_is_fetched_and_replaces_a_withdrawn_key(world: World, issuer: TokenIssuer) -> None:
    cluster, clock, keys = world
    cluster.issuers = (issuer.rotated("key-2"),)
    clock.forward(11)
    assert await keys.find("key-2") is not None
    assert (await keys.find(issuer.key_id), cluster.fetches) == (None, 2)


async def test_unknown_key_ids_cause_one_request_in_ten_seconds(world: World, issuer: TokenIssuer) -> None:
    """Callers cannot load the API server with made-up key IDs, one after another or at once."""
    cluster, clock, keys = world
    assert await keys.find("made-up") is None
    clock.forward(9)
    assert await keys.find("made-up") is None
    assert cluster.fetches == 1
    clock.forward(1)
    assert await asyncio.gather(*(keys.find(f"made-up-{number}") for number in range(20))) == [None] * 20
    assert cluster.fetches == 2
    assert await keys.find(issuer.key_id) is not None


async def test_calls_with_unknown_key_ids_do_not_delay_others(world: World, issuer: TokenIssuer) -> None:
    """All of them wait for one refresh. The share of their address limits their number."""
    cluster, clock, keys = world
    cluster.gate.clear()
    clock.forward(11)
    tasks = [asyncio.create_task(keys.find(f"made-up-{number}")) for number in range(100)]
    await asyncio.sleep(0)
    assert await keys.find(issuer.key_id) is not None
    cluster.gate.set()
    assert await asyncio.gather(*tasks) == [None] * 100
    assert cluster.fetches == 2


async def test_failed_refresh_is_retryable(world: World, issuer: TokenIssuer, registry: CollectorRegistry) -> None:
    """It can be a new key. Known keys stay in use."""
    cluster, clock, keys = world
    cluster.unavailable = True
    clock.forward(11)
    for _ in range(2):
        with pytest.raises(CertmountError, match="TokenReviewUnavailable: "):
            await keys.find("key-2")
    assert cluster.fetches == 2
    assert await keys.find(issuer.key_id) is not None
    assert registry.get_sample_value("certmount_token_verification_failures_total", {"source": "keys"}) == 1


async def test_find_fails_before_the_first_load(issuer: TokenIssuer, metrics: AuthorityMetrics) -> None:
    cluster = Cluster(issuer)
    cluster.unavailable = True
    keys = TokenKeys(cluster.fetch, metrics)
    with pytest.raises(CertmountError, match="cannot be reached"):
        await keys.load()
    assert not keys.loaded
    with pytest.raises(CertmountError, match=r"TokenReviewUnavailable: .* are not loaded yet"):
        await keys.find(issuer.key_id)


SECRET_KEY = {"kty": "oct", "kid": "a", "alg": "HS256", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"}
WEAK = TokenIssuer(key=rsa.generate_private_key(public_exponent=65537, key_size=1024))  # noqa: S505  # the test needs a weak key
GOOD = TokenIssuer()


CHANGES: list[dict[str, Any]] = [{"use": "enc"}, {"kid": ""}, {"kid": 7}, {"n": "!"}]
CHANGES += [{"alg": "PS256"}, {"alg": "none"}, {"alg": []}]
UNNAMED_ALGORITHM = {name: value for name, value in SECRET_KEY.items() if name != "alg"}


@pytest.mark.parametrize(
    "entry", [SECRET_KEY, UNNAMED_ALGORITHM, WEAK.jwk, {"kid": "a"}, *({**GOOD.jwk, **change} for change in CHANGES)]
)
def test_only_strong_signing_keys_with_an_id_are_used(entry: Any) -> None:
    with pytest.raises(CertmountError, match="contains no signing key"):
        parse_keys(jwks(entry))
    assert set(parse_keys(jwks(entry, {**GOOD.jwk, "kid": "good"})).keys) == {"good"}


async def test_keys_are_refreshed_regularly(world: World, issuer: TokenIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_driver.authority.authn.token_keys._REFRESH_INTERVAL_S", 0.001)
    cluster, _, keys = world
    async with in_background(keys.run()):
        cluster.unavailable = True
        await until(lambda: cluster.fetches > 3, "some failures")
        assert await keys.find(issuer.key_id) is not None
        cluster.unavailable, cluster.issuers = False, (issuer.rotated("key-2"),)
        await until(lambda: "key-2" in keys._loaded().keys, "the new key")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": 7}', '{"keys": [7]}', "[" * 100_000, '{"keys": null}'])
def test_invalid_key_set_is_rejected(text: str) -> None:
    with pytest.raises(CertmountError, match=r"not a JSON Web Key Set|contains no signing key"):
        parse_keys(PublishedKeys(ISSUER, text.encode()))
