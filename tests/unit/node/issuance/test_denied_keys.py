"""A key whose pods were denied gets no further pods, also after the deny list has changed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.node.issuance import stored_certificates
from csi_driver.node.issuance.certificate_client import CertificateClient
from csi_driver.node.issuance.certificate_request import CertificateRequest
from csi_driver.node.issuance.shared_certificates import SharedCertificates
from csi_driver.node.issuance.stored_certificates import StoredCertificates
from csi_driver.node.pods import PodToken
from csi_driver.node.volumes.volume import Volume, VolumeTable
from tests.unit.host.samples import record
from tests.unit.node.certificates import KEY, POD, ROOT_SETS, SPEC, obtained_certificate, private_key


@pytest.mark.parametrize("late_s", [1.0, float("inf")])
@pytest.mark.parametrize(
    "reason, requests",
    [(Reason.SERVICE_ACCOUNT_DENIED, 2), (Reason.NAME_NOT_ALLOWED, 1), (Reason.TOO_MANY_REQUESTS, 1)],
)
async def test_certificate_of_a_denied_service_account_is_not_given_to_other_pods(
    late_s: float, reason: Reason, requests: int
) -> None:
    """Only a denial affects all pods that share the certificate: rules can depend on the labels of a pod."""
    shared = SharedCertificates(mock.AsyncMock(return_value=None), lambda: ROOT_SETS, lambda: 61.0)
    shared.update(["acme"])
    queue, clock = mock.AsyncMock(), lambda: 61.0
    client = CertificateClient(queue, mock.Mock(), shared, mock.Mock(), mock.Mock(), clock, lambda: 0.5)
    client._request = mock.AsyncMock(return_value=obtained_certificate())  # type: ignore[method-assign]
    claims = mock.Mock(expires_at=1e9)
    first = CertificateRequest("a", POD, SPEC, PodToken(Secret("token"), claims))
    await client.obtain(first)
    queue.check.side_effect = queue.check_first.side_effect = CertmountError(reason, "no")
    with pytest.raises(CertmountError):
        await client.obtain(replace(first, late_s=late_s))
    queue.check.side_effect = queue.check_first.side_effect = None
    await asyncio.gather(client.obtain(replace(first, volume_id="b")), client.obtain(replace(first, volume_id="c")))
    assert client._request.await_count == requests


@pytest.mark.parametrize("denied", [False, True])
async def test_restarted_driver_does_not_share_a_key_that_must_be_replaced(
    monkeypatch: pytest.MonkeyPatch, denied: bool
) -> None:
    """The renewal of one volume was denied; another with the same certificate is renewed later."""
    volumes = VolumeTable()
    owner = {"pod_namespace": POD.namespace, "pod_name": POD.name, "service_account": POD.service_account}
    for volume_id, renew_at in (("a", 50.0), ("b", 70.0)):
        times = {"issued_at": 0.0, "renew_at": renew_at, "not_after": 100.0}
        refused = denied and volume_id == "a"
        volumes.keep(Volume(record(**owner, volume_id=volume_id, replace_key=refused, **times), SPEC))  # type: ignore[arg-type]
    monkeypatch.setattr(stored_certificates, "read_key_and_chain", lambda _directory: (private_key(), []))
    monkeypatch.setattr(stored_certificates, "verify_certificate", mock.Mock())
    store = mock.Mock(files_dir=Path)
    stored = StoredCertificates(store, volumes, lambda: ROOT_SETS, lambda: 60.0)
    assert (await stored.find(KEY) is None) is denied
