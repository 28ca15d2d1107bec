"""When the authority's own certificate is made anew. That handshakes get it is shown over the wire."""

from __future__ import annotations

from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.serving import ServingCertificate
from csi_driver.authority.signers import make_root
from csi_driver.core.keys import generate_key
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.clock import Clock

NAMES = Names.of([DNSName.parse("certmount-authority.certmount.svc")])
SIGNER = make_root("test", generate_key(KeyType.EC_P256), Clock().utc(), path_length=0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def serving(metrics: AuthorityMetrics, clock: Clock) -> ServingCertificate:
    return ServingCertificate(NAMES, metrics, clock.utc)


def test_it_is_made_anew_at_two_thirds_of_its_day(
    serving: ServingCertificate, clock: Clock, registry: CollectorRegistry
) -> None:
    """Not before, as each costs a key."""
    first = serving.refresh(SIGNER)
    clock.forward(timedelta(hours=15, minutes=59))
    assert serving.refresh(SIGNER) is first
    clock.forward(timedelta(minutes=1))
    assert serving.refresh(SIGNER) is not first
    expiry = registry.get_sample_value("certmount_serving_certificate_expiry_timestamp_seconds")
    assert expiry == (clock.utc() + timedelta(hours=24)).timestamp()


def test_it_is_made_anew_with_each_new_intermediate(serving: ServingCertificate, clock: Clock) -> None:
    """So that a replaced CA is shown at once."""
    first = serving.refresh(SIGNER)
    assert serving.refresh(make_root("other", generate_key(KeyType.EC_P256), clock.utc(), path_length=0)) is not first


def test_a_handshake_is_told_only_of_changes(serving: ServingCertificate, clock: Clock) -> None:
    """Parsing the same certificate again would make every handshake slower."""
    serving.credentials(SIGNER)
    assert serving._fetch() is None
    clock.forward(timedelta(hours=17))
    renewed = serving.refresh(SIGNER)
    assert serving._fetch() is renewed
    assert serving._fetch() is None
