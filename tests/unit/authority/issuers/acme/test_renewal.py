"""Renewal times, certificate identifiers, and the verification of chains."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

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
from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.names import DNSName, Names

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
    with pytest.raises(AcmeProblem, match="another key"):
        check_chain(chain, build_csr(ec.generate_private_key(ec.SECP256R1()), own))


@pytest.mark.parametrize("text", ["", "x", "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", "é"])
def test_response_without_a_chain_is_rejected(text: str) -> None:
    with pytest.raises(AcmeProblem, match="not a certificate chain"):
        parse_chain(text)
