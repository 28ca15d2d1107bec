"""ACME in the issuers' file: what is taken from it, what its schema says, and what can't be made here."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from csi_driver.authority.issuers.acme.chain import lets_encrypt_roots
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.acme.routes import NoRoutes
from csi_driver.authority.issuers.acme.settings import (
    PRODUCTION,
    STAGING,
    AcmeSettings,
    Dns01,
    ExternalAccount,
    Http01,
    StorePlace,
)
from csi_driver.authority.issuers.kinds import IssuerDependencies, make_issuer, read_issuers
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.config.document_reader import Path as Place
from csi_driver.core.config.issuers import FileSource, SecretSource
from csi_driver.core.errors import CertmountError
from tests.support.json_schema import valid

SCHEMA = json.loads((Path(__file__).parents[5] / "docs" / "issuers.schema.json").read_text(encoding="utf-8"))
FULL: dict[str, Any] = {
    "account": {"secret": "certmount/letsencrypt"},
    "directory": "https://acme.example.com:14000/dir",
    "email": "ops@example.com",
    "terms_agreed": True,
    "eab": {"key_id": "kid-1", "key": {"file": "/etc/eab"}},
    "dns01": {
        "server": "10.0.0.1:53",
        "tsig": {"secret": "certmount/tsig", "key": "key"},
        "zone": "acme.example.com",
        "resolvers": ["[fd00::1]:53", "192.0.2.1"],
        "nameservers": ["ns1.example.com"],
        "patience": "3m",
    },
    "http01": {"self_test": "10.0.0.2:80", "ingress_class": "nginx", "patience": "30s"},
    "ca": {"file": "/etc/ca.crt"},
    "roots": {"file": "/etc/roots.crt"},
    "profile": "shortlived",
    "preferred_chain": "ISRG Root X1",
    "while_pending": "internal",
}
LEAST: dict[str, Any] = {"account": {"folder": "/var/lib/certmount"}, "roots": {"file": "/etc/roots.crt"}, "http01": {}}
AWAY = object()


def _document(entry: object) -> dict[str, Any]:
    return {"issuers": [{"name": "public", "acme": entry}]}


def _read(entry: object) -> AcmeSettings:
    (declared,) = read_issuers(yaml.safe_dump(_document(entry)).encode())
    assert isinstance(declared.configuration, AcmeSettings)
    hash(declared)  # an issuer whose entry stays stays the same
    return declared.configuration


def test_a_full_entry() -> None:
    """Every key becomes a value, credentials by where they are."""
    dns01 = Dns01(
        "10.0.0.1:53",
        SecretSource("certmount", "tsig", "key"),
        "acme.example.com",
        ("[fd00::1]:53", "192.0.2.1"),
        ("ns1.example.com",),
        timedelta(minutes=3),
    )
    assert _read(FULL) == AcmeSettings(
        StorePlace("certmount", "letsencrypt"),
        email="ops@example.com",
        directory="https://acme.example.com:14000/dir",
        terms_agreed=True,
        dns01=dns01,
        http01=Http01("10.0.0.2:80", "nginx", timedelta(seconds=30)),
        external_account=ExternalAccount("kid-1", FileSource("/etc/eab")),
        ca_file="/etc/ca.crt",
        roots_file="/etc/roots.crt",
        profile="shortlived",
        preferred_chain="ISRG Root X1",
        while_pending="internal",
    )


def test_the_least_entry_tries_things_out() -> None:
    """Without a directory it is Let's Encrypt's staging environment, and nobody has agreed to anything."""
    settings = _read(LEAST)
    assert settings == AcmeSettings(
        StorePlace(folder="/var/lib/certmount"), roots_file="/etc/roots.crt", http01=Http01()
    )
    assert (settings.directory, settings.terms_agreed) == (STAGING, False)


def test_only_the_roots_of_lets_encrypt_are_known() -> None:
    """Whose certificates pods are to trust is said by the administrator, never by what a CA hands out."""
    known = {**LEAST, "directory": PRODUCTION}
    del known["roots"]
    assert _read(known).roots_file is None
    names = [x509.load_der_x509_certificate(root).subject.rfc4514_string() for root in lets_encrypt_roots()]
    assert "CN=ISRG Root X1,O=Internet Security Research Group,C=US" in names
    with pytest.raises(CertmountError, match=r"acme\.roots .*is missing"):
        _read({**known, "directory": "https://acme.example.com/dir"})


def test_all_that_is_wrong_is_said_at_once() -> None:
    """With its path; and what was meant to be secret is not told to the log."""
    entry = {
        "account": {},
        "directory": "http://ca",
        "dns01": {"server": "a:99999", "tsig": "k:hunter2"},
        "whilepending": "x",
    }
    with pytest.raises(CertmountError) as refusal:
        _read(entry)
    said = str(refusal.value)
    for words in ("acme.account", "acme.directory", "dns01.server", "dns01.tsig", "did you mean while_pending?"):
        assert words in said
    assert "hunter2" not in said


def _places(value: object, path: Place = ()) -> Iterator[Place]:
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(part, (*path, key))


def _changed(path: Place, change: object) -> Any:
    entry = copy.deepcopy(FULL)
    part: Any = entry
    for step in path[:-1]:
        part = part[step]
    if change is AWAY:
        del part[path[-1]]
    else:
        part[path[-1]] = change
    return entry


_CHANGES: list[Any] = [
    AWAY, None, "", "x", "/", "A b", "5m", 5, [], [1], [None], ["a b"], {}, {"unknown": "x"}, {"file": "/x"}, {"file": "x"},
    {"secret": "a/b"}, {"folder": "/x"}, {"folder": "/x", "secret": "a/b"}, True,
]  # fmt: skip


@pytest.mark.parametrize("path", [path for path in _places(FULL) if path], ids=str)
def test_the_schema_says_what_the_program_does(path: Place) -> None:
    """Each part of a full entry replaced by something else, taken away, or with a stranger beside it: both agree."""
    entries = [_changed(path, change) for change in _CHANGES]
    entries += [_changed((*path[:-1], "stranger"), "x")] if isinstance(path[-1], str) else []
    for entry in (FULL, LEAST, *entries):
        try:
            _read(entry)
            taken = True
        except CertmountError:
            taken = False
        assert taken == valid(SCHEMA, _document(entry)), entry


def test_it_is_made_without_looking_around(tmp_path: Path) -> None:
    """An issuer is made of its entry alone; what only a cluster has is asked for, and said to be missing outside of one."""

    def made(entry: object, tools: IssuerDependencies) -> object:
        (declared,) = read_issuers(yaml.safe_dump(_document(entry)).encode())
        return make_issuer(declared, tools)

    alone = IssuerDependencies(CredentialReader())
    assert isinstance(made(LEAST, alone), AcmeIssuer)
    with pytest.raises(CertmountError, match="issuer public: keeps its account in a Secret"):
        made(FULL, alone)
    stores: list[tuple[str, str]] = []

    def store(namespace: str, name: str) -> DirectoryStore:
        stores.append((namespace, name))
        return DirectoryStore(tmp_path)

    with pytest.raises(CertmountError, match="issuer public: makes Ingresses"):
        made(FULL, IssuerDependencies(CredentialReader(), store))
    assert isinstance(made(FULL, IssuerDependencies(CredentialReader(), store, lambda _: NoRoutes())), AcmeIssuer)
    assert stores == [("certmount", "letsencrypt")]
