"""Parsing NodePublishVolume calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver import POD_AUDIENCE
from csi_driver._proto import csi_pb2
from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.core.spec import DEFAULT_KEY_TYPE, KeyType
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.node.publishing.publish_request import (
    MAX_ATTRIBUTES_BYTES,
    parse_declaration,
    parse_publish,
    with_key_type,
)
from csi_driver.node.publishing.restore import new_record
from tests.support.kubelet import FakePod, Kubelet

_KUBELET_DIR = Path("/var/lib/kubelet")
_PREFIX = "csi.storage.k8s.io/"
_TOKENS = f"{_PREFIX}serviceAccount.tokens"
_POD = FakePod(uid="0b7a3c5e-6d0f-4e57-9d7a-0c9f1f6d2a11")

_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_changes = st.dictionaries(st.sampled_from(["exp", "sub", "kubernetes.io", "aud"]), _json)
_claims = _changes.map(lambda changes: _POD.token(**changes))
_texts = st.one_of(st.text(), _json.map(json.dumps))
_tokens = st.one_of(
    _texts, st.builds(lambda token: json.dumps({POD_AUDIENCE: {"token": token}}), st.one_of(_texts, _claims, _json))
)
_contexts = st.dictionaries(
    st.one_of(st.text(), st.sampled_from([f"{_PREFIX}{key}" for key in ("pod.uid", "pod.name", "ephemeral", "x")])),
    st.text(),
)


@pytest.fixture(scope="module")
def valid_call(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    kubelet = Kubelet(Path(tmp_path_factory.mktemp("kubelet")))
    return kubelet.publish_request(_POD, {"name": "shop.example.com"}, fs_group="2000").SerializeToString()


@pytest.fixture
def call(valid_call: bytes) -> csi_pb2.NodePublishVolumeRequest:
    return csi_pb2.NodePublishVolumeRequest.FromString(valid_call)


@given(_contexts, _tokens, st.booleans(), st.text(max_size=12), st.text(), st.booleans())
def test_any_call_is_parsed_or_rejected(
    valid_call: bytes, context: dict[str, str], tokens: str, in_secrets: bool, group: str, target: str, read_only: bool
) -> None:
    call = csi_pb2.NodePublishVolumeRequest.FromString(valid_call)
    call.volume_context.update(context)
    (call.secrets if in_secrets else call.volume_context)[_TOKENS] = tokens
    call.volume_capability.mount.volume_mount_group, call.target_path, call.readonly = group, target, read_only
    try:
        parsed = parse_publish(call, _KUBELET_DIR, "node-1")
        assert not any(key.startswith(_PREFIX) for key in parsed.attributes)
        assert parsed.token is None or parsed.token.claims.pod_uid == _POD.uid
        parse_declaration(parsed, _KUBELET_DIR)
    except CertmountError as error:
        assert error.reason.kind in (FailureKind.INVALID, FailureKind.NOT_AUTHENTICATED, FailureKind.MISCONFIGURED)
        assert str(error).isprintable()


def test_valid_call_is_parsed(call: csi_pb2.NodePublishVolumeRequest) -> None:
    parsed = parse_publish(call, _KUBELET_DIR, "node-1")
    assert (parsed.pod.namespace, parsed.pod.name, parsed.pod.uid) == (_POD.namespace, _POD.name, _POD.uid)
    assert parsed.attributes == {"name": "shop.example.com"}
    assert parsed.mount_group == 2000
    assert parsed.token is not None
    assert parsed.token.text.reveal() not in repr(parsed)
    assert "eyJ" not in repr(parsed)


def _fields(error: CertmountError) -> list[str]:
    return [getattr(fault, "field", "") for fault in error.faults]


def test_all_faults_are_reported_together(call: csi_pb2.NodePublishVolumeRequest) -> None:
    call.readonly = False
    call.ClearField("volume_capability")
    call.ClearField("volume_id")
    call.target_path = "relative"
    call.volume_context.update({"typo": "x", "duration": "-5m", f"{_PREFIX}ephemeral": "", f"{_PREFIX}x": "y"})
    with pytest.raises(CertmountError, match=r"^InvalidRequest: ") as caught:
        parse_publish(call, _KUBELET_DIR, "node-1")
    assert sorted(_fields(caught.value)) == sorted(
        [
            "volume_id",
            "volume_capability",
            "pod.spec.volumes[].csi.readOnly",
            "pod.spec.volumes[]",
            f"volumeAttributes.{_PREFIX}x",
            "volumeAttributes.typo",
            "volumeAttributes.duration",
            "target_path",
        ]
    )


def test_missing_context_is_one_error(call: csi_pb2.NodePublishVolumeRequest) -> None:
    """Without a pod UID, the target path cannot be checked."""
    call.volume_context.clear()
    with pytest.raises(CertmountError) as caught:
        parse_publish(call, _KUBELET_DIR, "node-1")
    keys = ("pod.name", "pod.namespace", "pod.uid", "serviceAccount.name")
    assert _fields(caught.value) == [*(f"volume_context {_PREFIX}{key}" for key in keys), "pod.spec.volumes[]"]


@pytest.mark.parametrize("character", ["\n", "\t", '"', "\\", "\x80", "\xe9", "\u2028", "\U0001f600"])
def test_driver_can_read_the_record_of_each_volume_that_it_accepts(
    call: csi_pb2.NodePublishVolumeRequest, character: str
) -> None:
    """Otherwise each restart of the driver quarantines the volume."""
    call.volume_context["name"] = character * ((MAX_ATTRIBUTES_BYTES - len("name")) // len(character.encode()))
    call.volume_id, call.target_path = "x" * 256, "/" + "x" * 1023
    record = new_record(parse_publish(call, _KUBELET_DIR, "node-1"), 1.0)
    assert VolumeRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\x1f"])
def test_control_characters_around_a_value_are_rejected(
    call: csi_pb2.NodePublishVolumeRequest, tmp_path: Path, character: str
) -> None:
    """They are spaces for Python. In a record, each needs six bytes."""
    target = tmp_path / "pods" / _POD.uid / "volumes" / "mount"
    target.parent.mkdir(parents=True)
    call.target_path = str(target)
    call.volume_context["csi.cert-manager.io/organizations"] = f"{character}Example"
    with pytest.raises(CertmountError) as caught:
        parse_declaration(parse_publish(call, tmp_path, "node-1"), tmp_path)
    text = "InvalidAttributes: volumeAttributes.csi.cert-manager.io/organizations: has control characters; remove them"
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "attributes, target, reason, fields",
    [
        ({"typo": "x"}, None, Reason.INVALID_ATTRIBUTES, ["volumeAttributes.typo"]),
        ({}, "relative", Reason.INVALID_REQUEST, ["target_path"]),
        ({}, "/elsewhere", Reason.INVALID_KUBELET_DIRECTORY, ["--kubelet-dir"]),
        ({"typo": "x"}, "/elsewhere", Reason.INVALID_REQUEST, ["volumeAttributes.typo", "--kubelet-dir"]),
    ],
)
def test_faults_of_attributes_and_target_path_are_reported_together(
    call: csi_pb2.NodePublishVolumeRequest,
    tmp_path: Path,
    attributes: dict[str, str],
    target: str | None,
    reason: Reason,
    fields: list[str],
) -> None:
    valid_target = tmp_path / "pods" / _POD.uid / "volumes" / "mount"
    valid_target.parent.mkdir(parents=True)
    call.volume_context.update(attributes)
    call.target_path = target or str(valid_target)
    request = parse_publish(call, tmp_path, "node-1")
    with pytest.raises(CertmountError) as caught:
        parse_declaration(request, tmp_path)
    assert (caught.value.reason, _fields(caught.value)) == (reason, fields)


@pytest.mark.parametrize(
    "attributes, key_type",
    [({}, KeyType.RSA_2048), ({"root-only": "false"}, KeyType.RSA_2048), ({"root-only": "true"}, DEFAULT_KEY_TYPE)],
)
def test_default_key_type_of_the_driver_is_for_volumes_with_a_key(
    call: csi_pb2.NodePublishVolumeRequest, tmp_path: Path, attributes: dict[str, str], key_type: KeyType
) -> None:
    """In a volume with only roots, it would be a fault that the user did not make."""
    target = tmp_path / "pods" / _POD.uid / "volumes" / "mount"
    target.parent.mkdir(parents=True)
    call.target_path = str(target)
    for key in [key for key in call.volume_context if not key.startswith(_PREFIX)]:
        del call.volume_context[key]
    call.volume_context.update(attributes)
    request = with_key_type(parse_publish(call, tmp_path, "node-1"), KeyType.RSA_2048)
    assert parse_declaration(request, tmp_path).spec.key_type is key_type
