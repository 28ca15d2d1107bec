"""When certificates are renewed, and what they are called until then."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.issuers.acme.chain import certificate_id, check_chain, parse_chain
from csi_driver.authority.issuers.acme.client import CaProblem
from csi_driver.authority.issuers.acme.renewal import Window, renewal_without_advice
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.names import DNSName, Names

_KEY = ec.generate_private_key(ec.SECP256R1())
_BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def _certificate(
    life: timedelta = timedelta(days=90), serial: int = 1, name: str = "a.example.test"
) -> x509.Certificate:
    authority = x509.AuthorityKeyIdentifier(bytes.fromhex("69885B6B87464041E1B37B847BA0AE2CDE01C8D4"), None, None)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(_KEY.public_key())
        .serial_number(serial)
        .not_valid_before(_BEGIN)
        .not_valid_after(_BEGIN + life)
        .add_extension(authority, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .sign(_KEY, hashes.SHA256())
    )


def test_the_name_of_a_certificate() -> None:
    """The example of RFC 9773 section 4.1; its serial number has its first bit set, so a zero byte before it."""
    assert certificate_id(_certificate(serial=0x87654321)) == "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"


@pytest.mark.parametrize("life, lead", [(90, 30), (365, 30), (45, 15), (6, 2)])
def test_renewal_without_advice(life: int, lead: int) -> None:
    """30 days before the end, or a third of the life."""
    expected = _BEGIN + timedelta(days=life - lead)
    assert renewal_without_advice(_certificate(timedelta(days=life))) == expected.timestamp()


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(0, 1), st.floats(0, 2e9) | st.none())
def test_the_moment_lies_in_the_window(start: float, length: float, jitter: float, planned: float | None) -> None:
    """Whatever was planned before; and what was planned stays, while the window allows it."""
    window = Window(start, start + length, 0)
    moment = window.moment(jitter, planned)
    assert window.start <= moment <= window.end or moment == pytest.approx(window.end)
    if planned is not None and window.start <= planned <= window.end:
        assert moment == planned


def test_a_certificate_that_was_not_ordered() -> None:
    """For other names, or another key, it is refused."""
    chain = (_certificate(),)
    check_chain(chain, build_csr(_KEY, Names.of([DNSName.parse("a.example.test")])))
    with pytest.raises(CaProblem, match=r"certificate for a\.example\.test and not b\.example\.test"):
        check_chain(chain, build_csr(_KEY, Names.of([DNSName.parse("b.example.test")])))
    with pytest.raises(CaProblem, match="another key"):
        check_chain(
            chain, build_csr(ec.generate_private_key(ec.SECP256R1()), Names.of([DNSName.parse("a.example.test")]))
        )


@pytest.mark.parametrize("text", ["", "x", "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", "é"])
def test_an_answer_that_is_no_chain(text: str) -> None:
    """Refused in words."""
    with pytest.raises(CaProblem, match="no chain of certificates"):
        parse_chain(text)
