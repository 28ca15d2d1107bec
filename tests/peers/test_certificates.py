"""Common TLS libraries accept every certificate, and the CA does not issue what they would reject."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.ca.certificates import Leaf, sign_leaf
from csi_driver.authority.ca.keyring import CAProfile, Keyring, make_keyring
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.certificates.name_constraints import NameConstraintSet, parse_constraint
from csi_driver.core.certificates.verification import ExpectedCertificate, verify_certificate
from csi_driver.core.names import Names, spiffe_id
from csi_driver.core.spec import KeyType, Usage
from tests.peers.verifiers import Presented, encoding_faults
from tests.unit.core import pki, strategies
from tests.unit.core.pki import key_of

pytestmark = pytest.mark.peers("openssl", "go")

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
ID = spiffe_id("cluster.local", "web", "shop")
ML_DSA = [kind for kind in KeyType if kind.value.startswith("ML-DSA")]
USUAL = [kind for kind in KeyType if kind not in ML_DSA and kind is not KeyType.RSA_4096]
BOTH = (Usage.SERVER, Usage.CLIENT)
SHOP = pki.names("shop.web.svc", ID.text)


@functools.cache
def ca(kind: KeyType | None, *permitted: str) -> Keyring:
    """Return the same key each time, because keys are slow to generate."""
    return make_keyring(NOW - timedelta(days=1), CAProfile(kind, tuple(map(parse_constraint, permitted))))


@contextmanager
def presented(
    keyring: Keyring,
    names: Names,
    key_type: KeyType = KeyType.EC_P256,
    usages: tuple[Usage, ...] = BOTH,
    life_s: int = 60,
) -> Iterator[Presented]:
    leaf = Leaf(key_of(key_type).public_key(), names, timedelta(seconds=life_s), usages)
    with tempfile.TemporaryDirectory() as folder:
        yield Presented(keyring, sign_leaf(leaf, keyring.intermediate, NOW), NOW, Path(folder))


emails = st.builds("{}@{}".format, strategies.labels, strategies.host_names)
texts = st.one_of(strategies.dns_texts, strategies.uri_texts, strategies.ip_texts, emails)
any_names = st.lists(texts, max_size=12).map(lambda found: pki.names(ID.text, *found))
usages_of = st.sampled_from([(Usage.SERVER,), (Usage.CLIENT,), BOTH])
SIGNERS = [None, KeyType.RSA_3072, KeyType.EC_P384, KeyType.ED25519]


@given(st.sampled_from(SIGNERS), any_names, st.sampled_from([*USUAL, *ML_DSA]), usages_of, st.integers(10, 30 * 86_400))
def test_verifiers_accept_every_certificate_for_its_usages_only(
    signer: KeyType | None, names: Names, key_type: KeyType, usages: tuple[Usage, ...], life_s: int
) -> None:
    """OpenSSL in strict mode, Go and the rules of the Web PKI accept it. Each reads the granted names, and the DER is strict."""
    with presented(ca(signer), names, key_type, usages, life_s) as shown:
        assert encoding_faults(shown.leaf) == []
        seen = {}
        for usage in BOTH:
            seen = shown.go(usage, _host(names) if usage is Usage.SERVER else "")
            assert ("error" not in seen) == (usage in usages), seen.get("error")
            if key_type in USUAL:  # an OpenSSL before 3.5 can't read the key
                assert (shown.openssl(usage) == "") == (usage in usages)
        assert (seen["version"], seen["ca"]) == (3, False)
        assert [seen["dns"] or [], seen["uris"]] == [[*map(str, names.dns)], [*map(str, names.uris)]]
        assert [seen["ips"] or [], seen["emails"] or []] == [[*map(str, names.ips)], [*map(str, names.emails)]]
        if signer is not KeyType.ED25519:  # which the web's rules do not know for a CA
            for usage in BOTH:
                answer = shown.webpki(usage, _subject(names))
                assert (answer == "") == (
                    usage in usages or (usage is Usage.SERVER and not _host(names) and not names.ips)
                )


def _host(names: Names) -> str:
    """A host that the certificate must be valid for; empty if it has no host name."""
    return names.dns[0].text.replace("*.", "any.") if names.dns else ""


def _subject(names: Names) -> x509.DNSName | x509.IPAddress | None:
    if names.dns:
        return x509.DNSName(_host(names))
    return x509.IPAddress(names.ips[0].address) if names.ips else None


WORDS = ["dns:a.test", "dns:b.a.test", "dns:test", "uri:a.test", "uri:.a.test", "uri:b.a.test"]
WORDS += ["ip:10.0.0.0/8", "ip:10.1.0.0/16", "ip:fd00::/8", "email:a.test", "email:.a.test", "email:x@a.test"]
HOSTS = ["a.test", "b.a.test", "c.b.a.test", "xa.test", "test", "b.test", "a.test.org"]
EMAILS = [*(f"x@{host}" for host in HOSTS), "y@a.test"]
ADDRESSES = ["10.1.2.3", "10.9.0.1", "11.0.0.1", "fd00::1", "fe80::1"]
NEAR = [*HOSTS, "*.a.test", "*.b.a.test", "*.b.test", *(f"https://{host}/x" for host in HOSTS), *ADDRESSES, *EMAILS]
near_names = st.lists(st.sampled_from(NEAR), min_size=1, max_size=6).map(lambda found: pki.names(*found))


@given(st.frozensets(st.sampled_from(WORDS), min_size=1, max_size=4), near_names)
def test_name_constraints_are_read_as_openssl_and_go_read_them(words: frozenset[str], names: Names) -> None:
    """Both verifiers accept what the CA issues. At least one of them rejects what the CA does not issue."""
    keyring = ca(None, *sorted(words))
    permitted = not NameConstraintSet.of((*keyring.intermediates, keyring.root)).violations(names)
    assert permitted == (not any(answers(keyring, names)))


def answers(keyring: Keyring, names: Names) -> list[str]:
    with presented(keyring, names) as shown:
        return [shown.openssl(Usage.SERVER), shown.go(Usage.SERVER).get("error", "")]


OUTSIDE = {
    "dns:example.com": "a.example.org",
    "uri:cluster.local": "spiffe://other.local/ns/web/sa/shop",
    "ip:10.0.0.0/8": "192.0.2.1",
    "email:example.com": "a@example.org",
}


@pytest.mark.parametrize("constraint", OUTSIDE)
@pytest.mark.parametrize("kind", [None, KeyType.RSA_3072])
def test_all_verifiers_reject_a_certificate_outside_the_name_constraints(constraint: str, kind: KeyType | None) -> None:
    """The constraints also limit a stolen intermediate or a mistake in the policy."""
    openssl, go = answers(ca(kind, constraint), pki.names(OUTSIDE[constraint]))
    assert "permitted subtree violation" in openssl
    assert go


@pytest.mark.parametrize("kind", ML_DSA)
def test_cryptography_accepts_a_chain_of_ml_dsa(kind: KeyType) -> None:
    """Root, intermediate and leaf: by cryptography's verifier, and by the checks of the node driver."""
    with presented(ca(kind), SHOP, kind) as shown:
        assert encoding_faults(shown.leaf) == []
        assert shown.webpki(Usage.SERVER, x509.DNSName("shop.web.svc")) == ""
        assert shown.webpki(Usage.CLIENT) == ""
        chain = [one.public_bytes(Encoding.DER) for one in (shown.leaf, *shown.keyring.intermediates)]
        expected = ExpectedCertificate(key_of(kind).public_key(), SHOP, "web", "shop")
        bundle = verify_certificate(chain, shown.keyring.roots_der, expected, NOW)
        assert public_bytes(bundle.leaf.public_key()) == public_bytes(key_of(kind).public_key())  # type: ignore[arg-type]  # ours
        usage = shown.leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.digital_signature
        assert not usage.key_encipherment  # RFC 9881 section 5


@pytest.mark.parametrize("kind", ML_DSA)
def test_openssl_accepts_a_chain_of_ml_dsa(kind: KeyType) -> None:
    """In strict mode, OpenSSL 3.5 or newer."""
    with presented(ca(kind), SHOP, kind) as shown:
        assert [shown.openssl(usage, kind) for usage in BOTH] == ["", ""]


@pytest.mark.parametrize("kind", ML_DSA)
def test_newest_openssl_accepts_only_the_chain_of_ml_dsa_with_the_right_root(kind: KeyType) -> None:
    """Test the OpenSSL in the cryptography package. It rejects the chain with another root of the same key type."""
    with presented(ca(kind), SHOP, kind) as shown:
        assert shown.newest_openssl() == ""
        other = replace(shown, keyring=replace(shown.keyring, roots=make_keyring(NOW, CAProfile(kind)).roots))
        assert "unable to get local issuer certificate" in other.newest_openssl()


def test_verifiers_accept_a_new_intermediate_like_the_previous_one() -> None:
    """It has the name constraints of its predecessor."""
    keyring = ca(None, "dns:example.com").renew_intermediate(NOW)
    for name, believed in (("a.example.com", True), ("a.example.org", False)):
        with presented(keyring, pki.names(name)) as shown:
            assert (shown.openssl(Usage.SERVER) == "", "error" not in shown.go(Usage.CLIENT)) == (believed, believed)
