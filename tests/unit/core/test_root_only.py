"""Volumes with only roots: which attributes they accept, and which files they have."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.core.attributes import ATTRIBUTES, CertificateSpec, parse_attributes
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.file_format import StorePassword, VolumeContents
from csi_driver.core.formats.registry import FORMATS, PRESETS
from csi_driver.core.secret import Secret
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import authority

ROOT = authority("root").certificate
ROOT_ONLY = {"root-only": "true"}
EXAMPLES = {row.name: row.example for row in ATTRIBUTES if row.name != "root-only"}
OWNERS = ("uid", "gid", "fs-group", "key-mode")
FOR_ROOTS = {
    *OWNERS, "issuer", "federations", "files", "ca-file", "truststore-file", "password-file", "pkcs12-encryption", "reload",
}  # fmt: skip
FILES = {
    "autocert": {"root.crt"},
    "kubernetes": {"ca.crt"},
    "credential-bundle": {"roots.pem"},
    "haproxy": {"ca.crt"},
    "postgres": {"root.crt"},
    "java": {"truststore.p12", "keystore.password"},
}


def fault_of(attributes: dict[str, str]) -> str:
    with pytest.raises(CertmountError) as raised:
        parse_attributes({**ROOT_ONLY, **attributes})
    return str(raised.value)


def contents_of(spec: CertificateSpec) -> VolumeContents:
    password = StorePassword(Secret(b"password"), generated=True) if spec.layout.has_stores else None
    return VolumeContents(None, (), (ROOT,), password)


@pytest.mark.parametrize("preset", PRESETS)
def test_volume_has_the_files_with_roots_of_each_set(preset: str) -> None:
    added = {"ca-file": "roots.pem"} if preset == "credential-bundle" else {}
    spec = parse_attributes({**ROOT_ONLY, "files": preset, **added})
    assert {file.name for file in spec.layout.render(contents_of(spec))} == FILES[preset] | {"generation.json"}
    assert not spec.layout.has_certificate
    assert not spec.layout.strict


def test_set_without_roots_is_rejected() -> None:
    expected = "InvalidAttributes: volumeAttributes.files: selects no file with roots; add ca-file or truststore-file"
    assert fault_of({"files": "credential-bundle"}) == expected


def test_one_fault_names_all_attributes_that_need_a_certificate() -> None:
    assert fault_of({"name": "shop.web.svc", "duration": "1h", "keystore-file": "k", "key-mode": "0400"}) == (
        "InvalidAttributes: volumeAttributes.root-only: cannot be combined with name, duration, keystore-file, key-mode, "
        "because the volume has no certificate and no key; omit root-only, or the other attributes"
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_attribute_is_accepted_or_named(name: str) -> None:
    store = {"truststore-file": "roots.p12"} if name in ("password-file", "pkcs12-encryption", *OWNERS) else {}
    attributes = {**store, name: EXAMPLES[name]}
    if name in FOR_ROOTS:
        assert parse_attributes({**ROOT_ONLY, **attributes}).root_only
    else:
        assert f"volumeAttributes.root-only: cannot be combined with {name}, because" in fault_of(attributes)
    assert not parse_attributes({**store, name: EXAMPLES[name], "root-only": "false"}).root_only


@pytest.mark.parametrize("name", OWNERS)
def test_owner_and_mode_need_a_file_with_a_password(name: str) -> None:
    assert f"cannot be combined with {name}, because" in fault_of({name: EXAMPLES[name]})


def test_attributes_of_cert_managers_driver_are_named_as_written() -> None:
    """What the translation adds is no fault: the type of the key, for example."""
    spec = parse_attributes({**ROOT_ONLY, "csi.cert-manager.io/issuer-name": "internal"})
    assert dict(spec.layout.names) == {"ca-file": "ca.crt"}
    fault = fault_of({"csi.cert-manager.io/uri-sans": "https://a.example", "csi.cert-manager.io/fs-group": "1"})
    assert "cannot be combined with csi.cert-manager.io/uri-sans, csi.cert-manager.io/fs-group, because" in fault


@given(st.sets(st.sampled_from(sorted(EXAMPLES))), st.sampled_from(sorted(PRESETS)))
@example({"password-file", "key-file"}, "credential-bundle")
def test_any_attributes_give_only_roots_or_all_faults(names: set[str], preset: str) -> None:
    attributes = {**ROOT_ONLY, **{name: EXAMPLES[name] for name in names}, "files": preset}
    spec = outcome(lambda: parse_attributes(attributes), CertmountError)
    if isinstance(spec, CertmountError):
        assert spec.reason is Reason.INVALID_ATTRIBUTES
        assert all(name in str(spec) for name in names - FOR_ROOTS)
        return
    assert names <= FOR_ROOTS
    rendered = spec.layout.render(contents_of(spec))
    for file in rendered:
        content = file.content.reveal()
        assert b"PRIVATE KEY" not in content
        assert file.private == (content == b"password")
    roots = [each for each in FORMATS if each.attribute in spec.layout.names and not each.private]
    assert roots
    assert not any(each.certificate for each in roots)
