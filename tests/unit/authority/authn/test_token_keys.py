"""Which keys tokens are believed by, and how often the cluster is asked for them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from prometheus_client import CollectorRegistry

from csi_driver.authority.authn.token_keys import TokenKeys, parse_keys
from csi_driver.core.cluster.token_review import PublishedKeys
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import ISSUER, TokenIssuer
from tests.support.waiting import until
from tests.unit.authority.clock import Clock


class Cluster:
    """Publishes keys, counts how often it is asked, and fails on demand."""

    def __init__(self, *issuers: TokenIssuer) -> None:
        self.issuers = issuers
        self.asked = 0
        self.down = False

    async def fetch(self) -> PublishedKeys:
        self.asked += 1
        await asyncio.sleep(0)
        if self.down:
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "the API server cannot be reached")
        return PublishedKeys(ISSUER, json.dumps({"keys": [issuer.jwk for issuer in self.issuers]}).encode())


def jwks(*entries: Any) -> PublishedKeys:
    return PublishedKeys(ISSUER, json.dumps({"keys": entries}).encode())


async def test_a_new_key_is_found_when_a_token_first_names_it(issuer: TokenIssuer, metrics: AuthorityMetrics) -> None:
    """A cluster that rotates its keys needs no restart here."""
    cluster, clock = Cluster(issuer), Clock()
    keys = TokenKeys(cluster.fetch, metrics, clock)
    await keys.load()
    cluster.issuers = (issuer, issuer.rotated("key-2"))
    clock.forward(11)
    assert await keys.find("key-2") is not None
    assert cluster.asked == 2


async def test_made_up_key_ids_cause_one_request_in_ten_seconds(issuer: TokenIssuer, metrics: AuthorityMetrics) -> None:
    """Whoever sends tokens can't turn them into load on the API server, one after another or at once."""
    cluster, clock = Cluster(issuer), Clock()
    keys = TokenKeys(cluster.fetch, metrics, clock)
    await keys.load()
    assert await keys.find("made-up") is None
    clock.forward(9)
    assert await keys.find("made-up") is None
    assert cluster.asked == 1
    clock.forward(1)
    assert await asyncio.gather(*(keys.find(f"made-up-{number}") for number in range(20))) == [None] * 20
    assert cluster.asked == 2
    assert await keys.find(issuer.key_id) is not None


async def test_made_up_key_ids_hold_few_places(
    issuer: TokenIssuer, metrics: AuthorityMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a slow API server is asked for the keys a few calls wait for them; the rest is sent away, and good tokens pass."""
    monkeypatch.setattr("csi_driver.authority.authn.token_keys._MOST_WAITING", 3)
    cluster, clock, gate = Cluster(issuer), Clock(), asyncio.Event()

    async def slow() -> PublishedKeys:
        if cluster.asked:
            await gate.wait()
        return await cluster.fetch()

    keys = TokenKeys(slow, metrics, clock)
    await keys.load()
    clock.forward(11)
    tasks = [asyncio.create_task(keys.find(f"made-up-{number}")) for number in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(CertmountError) as refusal:
        await keys.find("made-up-4")
    assert refusal.value.reason is Reason.AUTHORITY_OVERLOADED
    assert await keys.find(issuer.key_id) is not None
    gate.set()
    assert await asyncio.gather(*tasks) == [None] * 3


async def test_an_unknown_key_is_no_refusal_while_the_cluster_cannot_be_asked(
    issuer: TokenIssuer, metrics: AuthorityMetrics, registry: CollectorRegistry
) -> None:
    """It may be a new key: so the answer is to try again, while known keys go on to be believed."""
    cluster, clock = Cluster(issuer), Clock()
    keys = TokenKeys(cluster.fetch, metrics, clock)
    await keys.load()
    cluster.down = True
    clock.forward(11)
    for _ in range(2):
        with pytest.raises(CertmountError) as failure:
            await keys.find("key-2")
        assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE
    assert cluster.asked == 2
    assert await keys.find(issuer.key_id) is not None
    assert registry.get_sample_value("certmount_token_proof_failures_total", {"proof": "keys"}) == 1


async def test_a_withdrawn_key_is_forgotten(issuer: TokenIssuer, metrics: AuthorityMetrics) -> None:
    """What the cluster publishes replaces what was held."""
    cluster, clock = Cluster(issuer), Clock()
    keys = TokenKeys(cluster.fetch, metrics, clock)
    await keys.load()
    cluster.issuers = (issuer.rotated("key-2"),)
    await keys.load()
    assert await keys.find(issuer.key_id) is None


async def test_before_the_first_keys_nothing_can_be_proven(issuer: TokenIssuer, metrics: AuthorityMetrics) -> None:
    """Not known is not refused: whoever asks is told to come again."""
    cluster = Cluster(issuer)
    cluster.down = True
    keys = TokenKeys(cluster.fetch, metrics)
    with pytest.raises(CertmountError, match="cannot be reached"):
        await keys.load()
    assert not keys.known
    with pytest.raises(CertmountError, match="not known yet"):
        await keys.find(issuer.key_id)


SECRET_KEY = {"kty": "oct", "kid": "a", "alg": "HS256", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"}
WEAK = TokenIssuer(key=rsa.generate_private_key(public_exponent=65537, key_size=1024))  # noqa: S505  # weak on purpose
GOOD = TokenIssuer()


@pytest.mark.parametrize(
    "entry",
    [
        SECRET_KEY,
        WEAK.jwk,
        {**GOOD.jwk, "use": "enc"},
        {**GOOD.jwk, "alg": "PS256"},
        {**GOOD.jwk, "alg": "none"},
        {**{name: value for name, value in SECRET_KEY.items() if name != "alg"}},
        {**GOOD.jwk, "kid": ""},
        {**GOOD.jwk, "kid": 7},
        {**GOOD.jwk, "n": "!"},
        {"kid": "a"},
    ],
    ids=[
        "shared",
        "weak",
        "encryption",
        "other algorithm",
        "none",
        "shared without algorithm",
        "empty id",
        "number as id",
        "damaged",
        "no type",
    ],
)
def test_only_strong_signing_keys_with_an_id_are_taken(entry: Any) -> None:
    """A shared secret, a short RSA key or a key for something else never verifies a token, even if published."""
    with pytest.raises(CertmountError, match="hold no signing key"):
        parse_keys(jwks(entry))
    assert set(parse_keys(jwks(entry, {**GOOD.jwk, "kid": "good"})).keys) == {"good"}


async def test_the_keys_are_fetched_again_and_again(
    issuer: TokenIssuer, metrics: AuthorityMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in between changes nothing and ends nothing."""
    monkeypatch.setattr("csi_driver.authority.authn.token_keys._REFRESH_S", 0.001)
    cluster = Cluster(issuer)
    keys = TokenKeys(cluster.fetch, metrics)
    await keys.load()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(keys.run())
        cluster.down = True
        await until(lambda: cluster.asked > 3, "some failures")
        assert await keys.find(issuer.key_id) is not None
        cluster.down, cluster.issuers = False, (issuer.rotated("key-2"),)
        await until(lambda: "key-2" in keys._held().keys, "the new key")
        running.cancel()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": 7}', '{"keys": [7]}', "[" * 100_000, '{"keys": null}'])
def test_what_is_no_key_set_says_so(text: str) -> None:
    """A wrong file or answer is told from an empty one."""
    with pytest.raises(CertmountError, match=r"not a JSON Web Key Set|hold no signing key"):
        parse_keys(PublishedKeys(ISSUER, text.encode()))
