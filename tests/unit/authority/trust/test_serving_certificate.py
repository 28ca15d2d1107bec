"""When the authority's serving certificate is renewed. tests/integration shows that handshakes use it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.certificates import ROOT_LIFETIME, make_root
from csi_driver.authority.ca.keyring import encode_keyring, make_keyring
from csi_driver.authority.trust.serving_certificate import (
    SERVING,
    SERVING_KEY,
    ServingCertificate,
    encode_serving_root,
    load_serving_root,
    make_serving_root,
)
from csi_driver.core.certificates.keys import generate_key, key_type_of
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import DNSName, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.clock import Clock

NAMES = Names.of([DNSName.parse("certmount-authority.certmount.svc")])
SIGNER = make_root("test", generate_key(KeyType.EC_P256), Clock().utc(), path_length=0)


@pytest.fixture
def serving(metrics: AuthorityMetrics, clock: Clock) -> ServingCertificate:
    return ServingCertificate(NAMES, metrics, clock.utc)


def test_serving_certificate_is_renewed_after_two_thirds_of_its_lifetime(
    serving: ServingCertificate, clock: Clock, registry: CollectorRegistry
) -> None:
    first = serving.refresh(SIGNER)
    clock.forward(timedelta(hours=15, minutes=59))
    assert serving.refresh(SIGNER) is first
    clock.forward(timedelta(minutes=1))
    assert serving.refresh(SIGNER) is not first
    expiry = registry.get_sample_value("certmount_serving_certificate_expiry_timestamp_seconds")
    assert expiry == (clock.utc() + timedelta(hours=24)).timestamp()


def test_certificate_is_renewed_after_a_step_back_or_for_a_new_signer(
    serving: ServingCertificate, clock: Clock
) -> None:
    first = serving.refresh(SIGNER)
    clock.forward(timedelta(hours=-2))
    second = serving.refresh(SIGNER)
    assert second is not first
    clock.forward(timedelta(hours=1))
    assert serving.refresh(SIGNER) is second
    assert serving.refresh(make_root("other", generate_key(KeyType.EC_P256), clock.utc(), path_length=0)) is not second


def test_handshake_gets_only_changes(serving: ServingCertificate, clock: Clock) -> None:
    """Parsing the same certificate again would slow down every handshake."""
    serving.credentials(SIGNER)
    assert serving._fetch() is None
    clock.forward(timedelta(hours=17))
    renewed = serving.refresh(SIGNER)
    assert serving._fetch() is renewed
    assert serving._fetch() is None


def test_serving_root_is_created_and_read_back() -> None:
    now = Clock().utc()
    root = make_serving_root(now)
    certificate = root.certificate
    assert certificate.subject.rfc4514_string().startswith("CN=certmount authority ")
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert key_type_of(certificate.public_key()) is KeyType.EC_P256
    assert certificate.not_valid_after_utc - now == ROOT_LIFETIME
    values = {**encode_serving_root(root), **encode_keyring(make_keyring(now))}
    loaded = load_serving_root(values, now, where="here")
    assert loaded is not None
    assert encode_serving_root(loaded) == encode_serving_root(root)


def test_serving_root_is_missing_only_if_both_values_are() -> None:
    now = Clock().utc()
    assert load_serving_root(encode_keyring(make_keyring(now)), now, where="here") is None
    for name in (SERVING, SERVING_KEY):
        values = {**encode_serving_root(make_serving_root(now)), name: Secret(b"")}
        with pytest.raises(CertmountError, match=f"here {name}: is missing"):
            load_serving_root(values, now, where="here")


def test_error_lists_all_faults_of_the_serving_root() -> None:
    now = Clock().utc()
    one, other = encode_serving_root(make_serving_root(now)), encode_serving_root(make_serving_root(now))
    with pytest.raises(CertmountError) as refusal:
        load_serving_root({**one, SERVING_KEY: other[SERVING_KEY]}, now + ROOT_LIFETIME, where="here")
    assert refusal.value.reason is Reason.INVALID_CA
    text = str(refusal.value)
    assert "serving.key: is not the key of serving.crt" in text
    assert "serving.crt: expired at" in text
    assert "delete serving.crt and serving.key to create new ones" in text
    ca = encode_keyring(make_keyring(now))
    for values, words in (
        ({SERVING: ca["intermediate.crt"], SERVING_KEY: ca["intermediate.key"]}, "is not self-signed"),
        ({**one, SERVING: Secret(one[SERVING].reveal() + other[SERVING].reveal())}, "contains 2 certificates"),
    ):
        with pytest.raises(CertmountError, match=rf"serving\.crt: {words}"):
            load_serving_root(values, now, where="here")
