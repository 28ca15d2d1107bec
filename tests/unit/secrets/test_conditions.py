"""When a Secret needs a new certificate: the boundaries of each condition."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import assume, example, given
from hypothesis import strategies as st

from csi_driver.core.certificates.csr import san_extension
from csi_driver.core.certificates.keys import PrivateKey, encode_key, generate_key
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.names import DNSName, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from csi_driver.rpc.authority_messages import TrustBundle
from csi_driver.secrets.conditions import (
    Condition,
    CurrentCertificate,
    FoundCondition,
    find_condition,
    has_other_names,
    longest_wait,
    overdue_time,
    parse_current,
    renewal_time,
)
from csi_driver.secrets.requests import CertificateOptions, DesiredSecret, SecretName
from tests.support.scripted_authority import TestCA

START = datetime(2026, 11, 27, tzinfo=UTC)
CA = TestCA(lifetime=timedelta(days=3650))
KEY = generate_key(KeyType.EC_P256)
RSA_KEY = rsa.generate_private_key(65537, 2048)
TRUST = TrustBundle({"internal": RootSet((CA.der,), 1)}, "1", environments={"internal": "here"})
HOSTS = [f"h{number}.example.com" for number in range(5)]
DESIRED = DesiredSecret(
    SecretName("shop", "tls"), (DNSName("h0.example.com"),), CertificateOptions("internal"), (EventTarget("", "", ""),)
)


def certificate(lifetime: timedelta, *hosts: str, start: datetime = START, key: PrivateKey = KEY) -> x509.Certificate:
    names = Names.of([DNSName(host) for host in hosts or ("h0.example.com",)])
    builder = x509.CertificateBuilder(
        CA.certificate.subject, x509.Name([]), key.public_key(), 1, start, start + lifetime
    )
    return builder.add_extension(san_extension(names), critical=True).sign(CA.key, SHA256())


def current(lifetime: timedelta = timedelta(days=90), *hosts: str) -> CurrentCertificate:
    return CurrentCertificate(KEY, (certificate(lifetime, *hosts),))


def condition(
    found: CurrentCertificate,
    desired: DesiredSecret = DESIRED,
    now: datetime = START,
    annotations: Mapping[str, str] = {},  # nothing changes it
) -> Condition | None:
    finding = find_condition(found, annotations, desired, TRUST, now)
    return finding.condition if finding else None


@pytest.mark.parametrize("part", ["p", "q", "d", "dmp1", "dmq1", "iqmp", ""])
def test_rsa_key_with_a_damaged_part_does_not_match(part: str) -> None:
    """Its public part is still that of the certificate."""
    der = bytearray(RSA_KEY.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    if part:
        value = getattr(RSA_KEY.private_numbers(), part)
        der[der.index(value.to_bytes((value.bit_length() + 7) // 8, "big")) + 9] ^= 1
    pem = f"-----BEGIN RSA PRIVATE KEY-----\n{base64.b64encode(der).decode()}\n-----END RSA PRIVATE KEY-----\n".encode()
    chain = certificate(timedelta(days=90), key=RSA_KEY).public_bytes(Encoding.PEM)
    found = parse_current(chain, Secret(pem))
    assert found is not None
    finding = find_condition(found, {}, DESIRED, TRUST, START)
    expected = "the key does not belong to the certificate: the parts of the RSA key contradict each other"
    assert (str(finding) if finding else "") == (expected if part else "")


@given(seconds=st.integers(60, 10 * 365 * 86400))
@example(seconds=90 * 86400)
@example(seconds=86400)
def test_renewal_is_30_days_before_the_expiry_or_in_the_last_third_if_that_is_later(seconds: int) -> None:
    """With a tenth of jitter, which makes it earlier."""
    lifetime = timedelta(seconds=seconds)
    leaf = certificate(lifetime)
    before = leaf.not_valid_after_utc - renewal_time(leaf)
    window = min(timedelta(days=30), lifetime / 3)
    assert window <= before <= window * 1.1
    assert renewal_time(leaf) == renewal_time(leaf), "a restart does not change it"


@pytest.mark.parametrize(
    "lifetime,left", [(timedelta(days=90), timedelta(days=30)), (timedelta(hours=24), timedelta(hours=8))]
)
def test_certificate_is_left_alone_until_its_renewal_time(lifetime: timedelta, left: timedelta) -> None:
    found = current(lifetime)
    assert condition(found, now=renewal_time(found.leaf) - timedelta(seconds=1)) is None
    assert condition(found, now=renewal_time(found.leaf)) is Condition.EXPIRES_SOON
    assert condition(found, now=START + lifetime - left) is Condition.EXPIRES_SOON


@given(st.sets(st.sampled_from(HOSTS), min_size=1), st.sets(st.sampled_from(HOSTS), min_size=1))
def test_names_differ_in_either_direction(certified: set[str], wanted: set[str]) -> None:
    desired = dataclasses.replace(DESIRED, names=tuple(map(DNSName, sorted(wanted))))
    found = current(timedelta(days=90), *sorted(certified))
    assert condition(found, desired) is (None if certified == wanted else Condition.NAMES_DIFFER)


@given(st.sets(st.sampled_from(HOSTS), min_size=1), st.sets(st.sampled_from(HOSTS), min_size=1))
def test_names_in_addition_alone_are_no_condition_before_all_sources_are_read(
    certified: set[str], wanted: set[str]
) -> None:
    """A source that has not been read can request them."""
    desired = dataclasses.replace(DESIRED, names=tuple(map(DNSName, sorted(wanted))))
    found = current(timedelta(days=90), *sorted(certified))
    finding = find_condition(found, {}, desired, TRUST, START, complete=False)
    assert (finding.condition if finding else None) is (None if wanted <= certified else Condition.NAMES_DIFFER)
    assert has_other_names(found.leaf, desired) is bool(certified - wanted)
    late = find_condition(found, {}, desired, TRUST, renewal_time(found.leaf), complete=False)
    expected = Condition.EXPIRES_SOON if wanted <= certified else Condition.NAMES_DIFFER
    assert (late.condition if late else None) is expected


@pytest.mark.parametrize("condition", [None, *Condition])
@pytest.mark.parametrize("lifetime", [timedelta(minutes=5), timedelta(days=90)])
def test_renewal_that_removes_names_waits_for_unread_sources_until_the_certificate_is_overdue_at_most(
    lifetime: timedelta, condition: Condition | None
) -> None:
    """So no outage of an API lets a certificate expire."""
    leaf, settled_at = certificate(lifetime), START + timedelta(hours=1)
    latest = longest_wait(FoundCondition(condition) if condition else None, leaf, settled_at)
    assert renewal_time(leaf) < overdue_time(leaf) < leaf.not_valid_after_utc
    if condition is None:
        assert latest > leaf.not_valid_after_utc
    elif condition in (Condition.KEY_MISMATCH, Condition.NOT_PARSABLE):
        assert latest < START
    elif condition is Condition.EXPIRES_SOON:
        assert latest == overdue_time(leaf)
    else:
        assert latest == min(overdue_time(leaf), settled_at)


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 600))
def test_contents_of_a_secret_never_raise(chain: bytes, key: bytes, cut: int) -> None:
    """The owner of the namespace can write anything there."""
    pem, key_pem = certificate(timedelta(days=90)).public_bytes(Encoding.PEM), encode_key(KEY).reveal()
    assume(cut < len(pem) - 30)
    assert parse_current(chain, Secret(key_pem)) is None
    assert parse_current(pem, Secret(key)) is None
    assert parse_current(pem[:cut], Secret(key_pem)) is None
    assert parse_current(pem, Secret(key_pem)) is not None


def test_long_contents_are_not_parsed() -> None:
    pem, key = certificate(timedelta(days=90)).public_bytes(Encoding.PEM), encode_key(KEY)
    assert parse_current(pem * 11, key) is None
    assert parse_current(pem + b" " * 2**20, key) is None
    assert parse_current(pem, Secret(key.reveal() + b" " * 2**14)) is None


@pytest.mark.parametrize(
    "annotations,expected",
    [
        ({}, None),
        ({"issuer": "internal", "environment": "here"}, None),
        ({"issuer": "letsencrypt"}, Condition.OTHER_ISSUER),
        ({"environment": "staging"}, Condition.OTHER_ENVIRONMENT),
    ],
)
def test_issuer_and_environment_are_those_of_the_annotations(
    annotations: dict[str, str], expected: Condition | None
) -> None:
    assert condition(current(), annotations=annotations) is expected


@pytest.mark.parametrize("key_type", [None, *KeyType])
def test_key_type_matters_only_if_the_source_names_one(key_type: KeyType | None) -> None:
    desired = dataclasses.replace(DESIRED, options=CertificateOptions("internal", key_type))
    expected = None if key_type in (None, KeyType.EC_P256) else Condition.OTHER_KEY_TYPE
    assert condition(current(), desired) is expected


def test_certificates_of_an_unknown_issuer_are_left_alone() -> None:
    """The authority would not issue a new one."""
    desired = dataclasses.replace(DESIRED, options=CertificateOptions("removed"))
    assert condition(current(), desired, annotations={"issuer": "removed"}) is None
