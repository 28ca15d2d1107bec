"""A publish call is a value or one error, whatever it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver import POD_AUDIENCE
from csi_driver._proto import csi_pb2
from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.node.publishing.publish_request import parse_publish
from tests.support.kubelet import FakePod, Kubelet

_PREFIX = "csi.storage.k8s.io/"
_TOKENS = f"{_PREFIX}serviceAccount.tokens"
_KUBELET_DIR = Path("/var/lib/kubelet")
_POD = FakePod(uid="0b7a3c5e-6d0f-4e57-9d7a-0c9f1f6d2a11")

_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_claims = st.dictionaries(st.sampled_from(["exp", "sub", "kubernetes.io", "aud"]), _json).map(
    lambda changes: _POD.token(**changes)
)
_texts = st.one_of(st.text(), _json.map(json.dumps))
_tokens = st.one_of(
    _texts,
    st.builds(lambda token: json.dumps({POD_AUDIENCE: {"token": token}}), st.one_of(_texts, _claims, _json)),
)
_contexts = st.dictionaries(
    st.one_of(st.text(), st.sampled_from([f"{_PREFIX}{key}" for key in ("pod.uid", "pod.name", "ephemeral", "x")])),
    st.text(),
)


@pytest.fixture(scope="module")
def request_text(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good call."""
    kubelet = Kubelet(Path(tmp_path_factory.mktemp("kubelet")))
    return kubelet.publish_request(_POD, {"name": "shop.example.com"}, fs_group="2000").SerializeToString()


@given(_contexts, _tokens, st.booleans(), st.text(max_size=12), st.text())
def test_anything_is_a_value_or_an_error(
    request_text: bytes, context: dict[str, str], tokens: str, in_secrets: bool, group: str, target: str
) -> None:
    """Never another exception; the error is one line that any terminal may show, and final or not for the kubelet."""
    call = csi_pb2.NodePublishVolumeRequest.FromString(request_text)
    call.volume_context.update(context)
    (call.secrets if in_secrets else call.volume_context)[_TOKENS] = tokens
    call.volume_capability.mount.volume_mount_group, call.target_path = group, target
    try:
        parsed = parse_publish(call, _KUBELET_DIR)
    except CertmountError as error:
        assert error.reason.kind in (FailureKind.INVALID, FailureKind.NOT_AUTHENTICATED, FailureKind.MISCONFIGURED)
        assert str(error).isprintable()
    else:
        assert not any(key.startswith(_PREFIX) for key in parsed.attributes)
        assert parsed.token is None or parsed.token.claims.pod_uid == _POD.uid


def test_a_good_call(request_text: bytes) -> None:
    """Pod, attributes without the kubelet's own, group and token; nothing shows the token."""
    parsed = parse_publish(csi_pb2.NodePublishVolumeRequest.FromString(request_text), _KUBELET_DIR)
    assert (parsed.pod.namespace, parsed.pod.name, parsed.pod.uid) == (_POD.namespace, _POD.name, _POD.uid)
    assert parsed.attributes == {"name": "shop.example.com"}
    assert parsed.mount_group == 2000
    assert parsed.token is not None
    assert parsed.token.text.reveal() not in repr(parsed)
    assert "eyJ" not in repr(parsed)


def test_every_fault_is_told_at_once(request_text: bytes) -> None:
    """A call with several faults is one error with all of them."""
    call = csi_pb2.NodePublishVolumeRequest.FromString(request_text)
    call.volume_context.clear()
    call.ClearField("volume_capability")
    call.ClearField("volume_id")
    with pytest.raises(CertmountError) as caught:
        parse_publish(call, _KUBELET_DIR)
    assert caught.value.reason is Reason.INVALID_REQUEST
    fields = [getattr(fault, "field", "") for fault in caught.value.faults]
    assert {"volume_id", "volume_capability", f"volume_context {_PREFIX}pod.uid", "pod.spec.volumes[]"} <= set(fields)
