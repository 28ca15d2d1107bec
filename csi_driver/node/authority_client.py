"""The node driver's calls of the authority."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from csi_driver._proto import authority_pb2
from csi_driver._proto.authority_pb2_grpc import AuthorityStub
from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.node.authority_messages import CertificateCondition, CertificateReport
from csi_driver.rpc.authority_channel import AuthorityChannel, TokenFile
from csi_driver.rpc.authority_messages import IssuanceResponse, TrustBundle, issuance_response, trust_bundle
from csi_driver.rpc.issuance_messages import issue_request
from csi_driver.rpc.issue_stream_client import IssueStreamClient

_CONDITIONS = {
    CertificateCondition.RENEWAL_FAILING: authority_pb2.CONDITION_RENEWAL_FAILING,
    CertificateCondition.RENEWAL_OVERDUE: authority_pb2.CONDITION_OVERDUE,
    CertificateCondition.CERTIFICATE_EXPIRED: authority_pb2.CONDITION_EXPIRED,
    CertificateCondition.CERTIFICATE_RECOVERED: authority_pb2.CONDITION_RECOVERED,
    CertificateCondition.RENEWAL_STOPPED: authority_pb2.CONDITION_RENEWAL_STOPPED,
    CertificateCondition.RELOAD_FAILED: authority_pb2.CONDITION_RELOAD_FAILED,
}
_TOKEN_HINT = "mount a projected token with audience certmount-node in the DaemonSet"


class AuthorityClient:
    """Each method raises CertmountError: the authority's reason, RootCertificateMissing, NodeTokenMissing or AuthorityUnavailable."""

    def __init__(self, address: str, root_file: Path, token_file: Path, node: str = "this node") -> None:
        """``node`` names the node in errors."""
        self._channel = AuthorityChannel(address, root_file, TokenFile(token_file, "node driver", _TOKEN_HINT), node)
        # Separate, because an external issuer can take a minute, and the pods of the internal CA must not wait for it.
        self._internal, self._external = (IssueStreamClient(self._channel, node) for _ in range(2))
        self.root_problem = self._channel.root_problem
        self.check_connection = self._channel.check

    async def close(self) -> None:
        await self._internal.close()
        await self._external.close()
        await self._channel.close()

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        """Request a certificate for the names of a CSR (DER). If a replica fails, retry with another one for some seconds."""
        stream = self._internal if spec.issuer == DEFAULT_ISSUER else self._external
        return issuance_response(*await stream.issue(issue_request(csr, token, spec)))

    async def check(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> None:
        """Raise what :meth:`issue` would raise before the authority signs. The CSR can have any key."""
        request = authority_pb2.CheckRequest(request=issue_request(csr, token, spec), key_type=spec.key_type.value)
        await self._channel.call(lambda channel: AuthorityStub(channel).Check, request)

    async def watch_trust(self) -> AsyncIterator[TrustBundle]:
        """Yield the trust bundle now and after each change, until the authority ends the stream."""
        request = authority_pb2.WatchTrustRequest()
        async for bundle in self._channel.stream(lambda channel: AuthorityStub(channel).WatchTrust, request):
            yield trust_bundle(bundle)

    async def acknowledge_root_set(self, name: str, generation: int) -> None:
        """Acknowledge that all volumes of this node contain a root set with this generation or a newer one."""
        request = authority_pb2.ConfirmTrustRequest(set=name, generation=generation)
        await self._channel.send(lambda channel: AuthorityStub(channel).ConfirmTrust, request)

    async def report(self, report: CertificateReport) -> None:
        """Report the condition of a pod's certificate."""
        request = authority_pb2.ReportRequest(
            pod_token=report.token.reveal(),
            condition=_CONDITIONS[report.condition],
            reason=report.reason,
            message=report.message,
        )
        await self._channel.send(lambda channel: AuthorityStub(channel).Report, request)
