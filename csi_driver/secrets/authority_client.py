"""The controller's calls of the authority."""

from __future__ import annotations

from collections.abc import AsyncIterator

from csi_driver._proto import authority_pb2
from csi_driver._proto.authority_pb2_grpc import SecretsStub
from csi_driver.core.errors import Reason
from csi_driver.rpc.authority_channel import AuthorityChannel, TokenFile
from csi_driver.rpc.authority_messages import IssuanceResponse, TrustBundle, issuance_response, trust_bundle
from csi_driver.secrets.requests import DesiredSecret
from csi_driver.secrets.settings import SecretsSettings

_TOKEN_HINT = "mount a projected token with audience certmount-secrets in the Deployment"


class SecretsAuthorityClient:
    """Each method raises CertmountError: the authority's reason, RootCertificateMissing, SecretsTokenMissing or AuthorityUnavailable."""

    def __init__(self, settings: SecretsSettings) -> None:
        token = TokenFile(settings.token, "Secrets controller", _TOKEN_HINT, Reason.SECRETS_TOKEN_MISSING)
        self._channel = AuthorityChannel(
            settings.authority, settings.authority_root, token, "the Secrets controller's node"
        )
        self.root_problem = self._channel.root_problem
        self.close = self._channel.close

    async def issue(self, csr: bytes, desired: DesiredSecret) -> IssuanceResponse:
        """Request a certificate for a CSR (DER)."""
        options = desired.options
        request = authority_pb2.IssueForSecretRequest(
            csr=csr,
            namespace=desired.secret.namespace,
            secret=desired.secret.name,
            # The certificates are for servers, and many public CAs issue no others.
            usages=[authority_pb2.USAGE_SERVER],
            issuer=options.issuer,
            email=options.email,
            tsig_secret=options.tsig_secret,
        )
        if options.duration is not None:
            request.duration.FromTimedelta(options.duration)
        return issuance_response(*await self._channel.call(lambda channel: SecretsStub(channel).Issue, request))

    async def watch_trust(self) -> AsyncIterator[TrustBundle]:
        """Yield the trust bundle now and after each change, until the authority ends the stream."""
        request = authority_pb2.WatchTrustRequest()
        async for bundle in self._channel.stream(lambda channel: SecretsStub(channel).WatchTrust, request):
            yield trust_bundle(bundle)
