"""The state and its store, shared by replicas; renewal times, certificate identifiers, and the verification of chains."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.issuers.acme.certificates import (
    RenewalWindow,
    certificate_id,
    check_chain,
    default_renewal_time,
    parse_chain,
)
from csi_driver.authority.issuers.acme.client import AcmeProblem, OrderUnusable
from csi_driver.authority.issuers.acme.context import LeaseLost, OrderStore
from csi_driver.authority.issuers.acme.state import (
    MAX_BYTES,
    AcmeState,
    ChallengeRecord,
    NamesBackoff,
    OrderRecord,
    TrackedCertificate,
    decode,
    encode,
    names_id,
    order_id,
)
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import DNSName, Names
from csi_driver.core.secret import Secret, StoredSecrets
from tests.unit.authority.clock import Clock
from tests.unit.authority.issuers.acme.samples import certificate, order

_TEXT = st.text(max_size=20)
_TIME = st.floats(0, 4e9)
_CHALLENGE = st.builds(ChallengeRecord, _TEXT, _TEXT, _TEXT, _TEXT, _TEXT, _TEXT)
_ORDER = st.builds(
    OrderRecord, _TEXT, st.lists(_TEXT).map(tuple), st.binary(), _TIME, _TIME, _TEXT, _TEXT, _TEXT, _TIME, _TIME,
    st.integers(0, 100), _TEXT, st.lists(_CHALLENGE, max_size=3).map(tuple),
    st.lists(st.binary(), max_size=3).map(tuple), _TIME, st.booleans(), _TEXT,
)  # fmt: skip
_TRACKED = st.builds(TrackedCertificate, _TEXT, _TEXT, _TEXT, _TEXT, _TIME, _TIME, _TIME, _TEXT)
_BACKOFF = st.builds(NamesBackoff, _TEXT, _TIME, st.integers(0, 100), _TEXT, _TEXT, _TEXT, _TIME)
_STATE = st.builds(
    AcmeState,
    st.lists(_ORDER, max_size=4).map(tuple),
    st.lists(_BACKOFF, max_size=3).map(tuple),
    st.lists(_TRACKED, max_size=3).map(tuple),
)
_JSON = st.recursive(st.none() | st.integers() | _TEXT, lambda inner: st.dictionaries(_TEXT, inner))


@given(_STATE)
def test_state_is_decoded_as_it_was_encoded(state: AcmeState) -> None:
    assert decode(encode(state), "store") == state


@given(st.binary() | _JSON.map(lambda value: json.dumps(value).encode()))
def test_invalid_content_is_reported_with_what_to_do(content: bytes) -> None:
    with pytest.raises(CertmountError, match=r"orders\.json") as failure:
        decode(content, "Secret a/b")
    assert failure.value.reason is Reason.ISSUER_UNAVAILABLE


def test_common_intermediates_are_encoded_once() -> None:
    intermediate = bytes(1000)
    orders = tuple(order(id=str(number), chain=(bytes([number]) * 10, intermediate)) for number in range(100))
    assert len(encode(AcmeState(orders))) < 100 * 700


@given(st.lists(_TEXT, min_size=1), st.binary(), st.binary())
def test_order_id_depends_on_the_set_of_names_and_the_key(names: list[str], key: bytes, other: bytes) -> None:
    assert order_id(names, key) == order_id(sorted(names, reverse=True), key)
    assert names_id(names) == names_id([*names, names[0]])
    assert (order_id(names, key) == order_id(names, other)) == (key == other)


def test_renewal_with_the_same_key_replaces_the_tracked_certificate() -> None:
    state = AcmeState()
    for identifier in ("old", "new"):
        state = state.with_certificate(certificate(certificate_id=identifier))
    assert [one.certificate_id for one in state.certificates] == ["new"]


class CountingStore(DirectoryStore):
    """Counts how often it is read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "acme.json")
        self.loads = 0

    async def load(self) -> StoredSecrets:
        self.loads += 1
        return await super().load()

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        await asyncio.sleep(0)
        return await super().save(values, based_on)


async def test_concurrent_changes_of_several_replicas_are_all_kept(tmp_path: Path) -> None:
    clock, store = Clock(), CountingStore(tmp_path)
    assert await store.save({"account.json": Secret(b"key")}, await store.load())
    replicas = [OrderStore(store, clock) for _ in range(4)]

    async def add(replica: OrderStore, order_id: str) -> None:
        await replica.change(lambda state: state.with_order(order(id=order_id)))

    ids = [str(number) for number in range(20)]
    await asyncio.gather(*(add(replicas[index % 4], order_id) for index, order_id in enumerate(ids)))
    assert {one.id for one in (await OrderStore(store, clock).read()).orders} == set(ids)
    assert (await store.load()).values["account.json"] == Secret(b"key")


async def test_concurrent_readers_share_one_read_per_second(tmp_path: Path) -> None:
    clock, store = Clock(), CountingStore(tmp_path)
    orders = OrderStore(store, clock)
    for reads in (1, 2):
        await asyncio.gather(*(orders.read() for _ in range(50)))
        assert store.loads == reads
        clock.forward(1.0)


async def test_clock_that_is_set_back_does_not_stop_the_reads(tmp_path: Path) -> None:
    """Otherwise a replica would not know the HTTP-01 tokens and the certificates of others until its clock catches up."""
    clock, store = Clock(), CountingStore(tmp_path)
    orders, other = OrderStore(store, clock), OrderStore(store, clock)
    await orders.read()
    clock.forward(-3600.0)
    await other.change(lambda state: state.with_order(order()))
    assert [one.id for one in (await orders.read()).orders] == [order().id]


async def test_only_the_lease_holder_changes_an_order(tmp_path: Path) -> None:
    orders = OrderStore(CountingStore(tmp_path), Clock())
    await orders.change(lambda state: state.with_order(order(holder="you")))
    for unowned in (order().id, "unknown"):
        with pytest.raises(LeaseLost):
            await orders.change_order(unowned, "me", lambda one: replace(one, url="x"))
    assert (await orders.change_order(order().id, "you", lambda one: replace(one, url="x"))).url == "x"


async def test_state_larger_than_a_secret_is_not_saved(tmp_path: Path) -> None:
    orders = OrderStore(CountingStore(tmp_path), Clock())
    await orders.change(lambda state: state.with_order(order()))
    with pytest.raises(CertmountError, match="is full") as failure:
        await orders.change(lambda state: state.with_order(order(id="large", csr=bytes(MAX_BYTES))))
    assert failure.value.reason is Reason.AUTHORITY_OVERLOADED
    assert [one.id for one in (await orders.read(0.0)).orders] == [order().id]


async def test_wait_returns_at_a_change(tmp_path: Path) -> None:
    orders = OrderStore(CountingStore(tmp_path), Clock())
    waiting = asyncio.ensure_future(orders.wait(60))
    await asyncio.sleep(0)
    await orders.change(lambda _: AcmeState((order(),)))
    await asyncio.wait_for(waiting, 5)


_KEY = ec.generate_private_key(ec.SECP256R1())
_START = datetime(2026, 1, 1, tzinfo=UTC)


def _certificate(lifetime: timedelta = timedelta(days=90), serial: int = 1) -> x509.Certificate:
    authority = x509.AuthorityKeyIdentifier(bytes.fromhex("69885B6B87464041E1B37B847BA0AE2CDE01C8D4"), None, None)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(_KEY.public_key())
        .serial_number(serial)
        .not_valid_before(_START)
        .not_valid_after(_START + lifetime)
        .add_extension(authority, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("a.example.test")]), critical=True)
        .sign(_KEY, hashes.SHA256())
    )


def test_certificate_id_is_that_of_the_rfc() -> None:
    """The example of RFC 9773 section 4.1: the first bit of the serial number is set, so a zero byte precedes it."""
    assert certificate_id(_certificate(serial=0x87654321)) == "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"


@pytest.mark.parametrize("lifetime, lead", [(90, 30), (365, 30), (45, 15), (6, 2)])
def test_default_renewal_is_30_days_or_a_third_of_the_lifetime_before_the_end(lifetime: int, lead: int) -> None:
    expected = _START + timedelta(days=lifetime - lead)
    assert default_renewal_time(_certificate(timedelta(days=lifetime))) == expected.timestamp()


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(0, 1), st.floats(0, 2e9) | st.none())
def test_renewal_time_is_in_the_window(start: float, length: float, jitter: float, planned: float | None) -> None:
    """A planned time stays while the window contains it."""
    window = RenewalWindow(start, start + length, 0)
    time = window.renewal_time(jitter, planned)
    assert window.start <= time <= window.end or time == pytest.approx(window.end)
    if planned is not None and window.start <= planned <= window.end:
        assert time == planned


def test_certificate_with_other_names_or_key_is_rejected() -> None:
    chain = (_certificate(),)
    own = Names.of([DNSName.parse("a.example.test")])
    check_chain(chain, build_csr(_KEY, own))
    with pytest.raises(AcmeProblem, match=r"certificate is for a\.example\.test, not b\.example\.test"):
        check_chain(chain, build_csr(_KEY, Names.of([DNSName.parse("b.example.test")])))
    with pytest.raises(OrderUnusable, match="another key"):
        check_chain(chain, build_csr(ec.generate_private_key(ec.SECP256R1()), own))


@pytest.mark.parametrize("pem", [b"", b"x", b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", b"\xc3"])
def test_response_without_a_chain_is_rejected(pem: bytes) -> None:
    with pytest.raises(AcmeProblem, match=r"^the response is not a certificate chain$"):
        parse_chain(pem)
