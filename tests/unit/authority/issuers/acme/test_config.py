"""ACME in the issuers file: what the parser accepts, and what needs a cluster."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from cryptography import x509

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.acme.certificates import lets_encrypt_roots
from csi_driver.authority.issuers.acme.config import (
    PRODUCTION,
    STAGING,
    AccountStorage,
    AcmeConfiguration,
    Dns01,
    ExternalAccount,
    Http01,
)
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.dependencies import ChallengeRoutes, CredentialReader, IssuerDependencies
from csi_driver.authority.issuers.kinds import make_issuer, read_issuers
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.config.document_reader import Path as DocumentPath
from csi_driver.core.config.issuers import FileSource, SecretSource
from csi_driver.core.errors import CertmountError
from tests.support.json_schema import places
from tests.unit.authority.issuers.schema import assert_schema_agrees

FULL: dict[str, Any] = {
    "account": {"secret": "certmount/letsencrypt"}, "directory": "https://acme.example.com:14000/dir",
    "email": "ops@example.com", "terms_agreed": True, "eab": {"key_id": "kid-1", "key": {"file": "/etc/eab"}},
    "dns01": {"server": "10.0.0.1:53", "tsig": {"secret": "certmount/tsig", "key": "key"}, "zone": "acme.example.com", "resolvers": ["[fd00::1]:53", "192.0.2.1"], "nameservers": ["ns1.example.com"], "patience": "3m", "tsig_secrets": ["shop/tsigkey"]},
    "http01": {"self_test": "10.0.0.2:80", "ingress_class": "nginx", "patience": "30s"}, "ca": {"file": "/etc/ca.crt"},
    "roots": {"file": "/etc/roots.crt"}, "profile": "shortlived", "preferred_chain": "ISRG Root X1",
    "while_pending": "internal",
}  # fmt: skip
MINIMAL: dict[str, Any] = {
    "account": {"directory": "/var/lib/certmount"}, "roots": {"file": "/etc/roots.crt"}, "http01": {},
}  # fmt: skip


def _document(entry: object) -> dict[str, Any]:
    return {"issuers": [{"name": "public", "acme": entry}]}


def _parse(entry: object) -> AcmeConfiguration:
    (declared,) = read_issuers(yaml.safe_dump(_document(entry)).encode())
    assert isinstance(declared.configuration, AcmeConfiguration)
    hash(declared)  # the registry uses declarations as keys
    return declared.configuration


def test_all_keys_are_parsed() -> None:
    assert _parse(FULL) == AcmeConfiguration(
        AccountStorage("certmount", "letsencrypt"), email="ops@example.com",
        directory="https://acme.example.com:14000/dir", terms_agreed=True,
        dns01=Dns01("10.0.0.1:53", SecretSource("certmount", "tsig", "key"), "acme.example.com", ("[fd00::1]:53", "192.0.2.1"), ("ns1.example.com",), timedelta(minutes=3), ("shop/tsigkey",)),
        http01=Http01("10.0.0.2:80", "nginx", timedelta(seconds=30)),
        external_account=ExternalAccount("kid-1", FileSource("/etc/eab")), ca_file="/etc/ca.crt",
        roots_file="/etc/roots.crt", profile="shortlived", preferred_chain="ISRG Root X1", while_pending="internal",
    )  # fmt: skip


def test_defaults_are_the_staging_environment_without_agreement_to_terms() -> None:
    configuration = _parse(MINIMAL)
    account = AccountStorage(directory="/var/lib/certmount")
    assert configuration == AcmeConfiguration(account, roots_file="/etc/roots.crt", http01=Http01())
    assert (configuration.directory, configuration.terms_agreed) == (STAGING, False)


def test_roots_are_optional_only_for_lets_encrypt() -> None:
    """Pods never trust a root because the CA's chain contains it."""
    entry = {**MINIMAL, "directory": PRODUCTION}
    del entry["roots"]
    assert _parse(entry).roots_file is None
    names = [x509.load_der_x509_certificate(root).subject.rfc4514_string() for root in lets_encrypt_roots()]
    assert "CN=ISRG Root X1,O=Internet Security Research Group,C=US" in names
    with pytest.raises(CertmountError, match=r"acme\.roots .*is missing"):
        _parse({**entry, "directory": "https://acme.example.com/dir"})


def test_all_faults_are_reported_together_without_secrets() -> None:
    dns01 = {"server": "a:99999", "tsig": "k:hunter2"}
    with pytest.raises(CertmountError) as failure:
        _parse({"account": {}, "directory": "http://ca", "dns01": dns01, "whilepending": "x"})
    text = str(failure.value)
    for expected in ("acme.account", "acme.directory", "dns01.server", "dns01.tsig", "did you mean while_pending?"):
        assert expected in text
    assert "hunter2" not in text


@pytest.mark.parametrize("path", list(places(_document(FULL))), ids=str)
def test_schema_agrees_with_the_parser(path: DocumentPath) -> None:
    assert_schema_agrees(_document(FULL), path)


def test_minimal_entry_agrees_with_the_schema() -> None:
    for path in places(_document(MINIMAL)):
        assert_schema_agrees(_document(MINIMAL), path)


def test_dependencies_that_need_a_cluster_are_reported(tmp_path: Path) -> None:
    def make(entry: object, dependencies: IssuerDependencies) -> Issuer:
        (declared,) = read_issuers(yaml.safe_dump(_document(entry)).encode())
        return make_issuer(declared, dependencies)

    outside = IssuerDependencies(CredentialReader())
    assert isinstance(make(MINIMAL, outside), AcmeIssuer)
    with pytest.raises(CertmountError, match="issuer public: needs a cluster for its account Secret"):
        make(FULL, outside)
    opened: list[tuple[str, str]] = []

    def store(namespace: str, name: str) -> DirectoryStore:
        opened.append((namespace, name))
        return DirectoryStore(tmp_path)

    with pytest.raises(CertmountError, match="issuer public: needs a cluster for its Ingresses"):
        make(FULL, IssuerDependencies(CredentialReader(), store))
    routes = cast("ChallengeRoutes", object())
    assert isinstance(make(FULL, IssuerDependencies(CredentialReader(), store, lambda _: routes)), AcmeIssuer)
    assert set(opened) == {("certmount", "letsencrypt")}


ANOTHER_FORM = "has its port in another form; write 192.0.2.53:5353"
UNBRACKETED = "is an IPv6 address without brackets; write [2001:db8::53] or [2001:db8::53]:PORT"


@pytest.mark.parametrize(
    "key, text, problem",
    [
        ("server", "a:99999", "has the port 99999; expected 1 to 65535"),
        ("server", "a:0", "has the port 0; expected 1 to 65535"),
        ("server", "dns://a:53", "is a URL; expected ADDRESS or ADDRESS:PORT, without a scheme"),
        ("server", "2001:db8::53", UNBRACKETED),
        *(("server", f"192.0.2.53{port}", ANOTHER_FORM) for port in ("#5353", "@5353", " port 5353", " 5353")),
        ("server", "a,b", "is not ADDRESS or ADDRESS:PORT"),
        ("zone", "*.example.com", "is not the name of a zone, such as acme.example.com"),
    ],
)
def test_address_in_another_form_is_explained(key: str, text: str, problem: str) -> None:
    words = re.escape(f"{text!r} {problem}")
    with pytest.raises(CertmountError, match=rf"issuers\[0\]\.acme\.dns01\.{key} \(line \d+\): {words}$"):
        _parse({**MINIMAL, "dns01": {"server": "192.0.2.53", key: text}})


def test_zone_can_end_with_a_dot() -> None:
    dns01 = _parse({**MINIMAL, "dns01": {"server": "192.0.2.53", "zone": "acme.example.com."}}).dns01
    assert dns01 == Dns01("192.0.2.53", zone="acme.example.com")


def test_key_id_with_a_line_break_is_explained() -> None:
    problem = "has white space or a line break around it; in YAML, write it after `key_id:`, without `|`"
    with pytest.raises(CertmountError, match=re.escape(rf"'kid-1\n' {problem}")):
        _parse({**MINIMAL, "eab": {"key_id": "kid-1\n", "key": {"file": "/etc/eab"}}})
