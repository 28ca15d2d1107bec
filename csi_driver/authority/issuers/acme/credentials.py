"""The credentials of an issuer as they are now: one that is replaced is used with the next order."""

from __future__ import annotations

from csi_driver.authority.issuers.acme.settings import AcmeSettings
from csi_driver.authority.issuers.acme.tsig import TsigKey
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.core.config.issuers import Source
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret


class Credentials:
    """Reads them anew each time; each method raises CertmountError IssuerUnavailable that says where, and shows nothing."""

    def __init__(self, settings: AcmeSettings, secrets: CredentialReader) -> None:
        self._settings = settings
        self._secrets = secrets

    async def tsig_key(self) -> TsigKey | None:
        """What updates are signed with; None where none is configured."""
        source = self._settings.dns01.key if self._settings.dns01 is not None else None
        return None if source is None else TsigKey.parse(await self._text(source), str(source))

    async def mac_key(self) -> Secret[str] | None:
        """What binds the account (RFC 8555 section 7.3.4); None where none is configured."""
        external = self._settings.external_account
        return None if external is None else await self._text(external.key)

    async def _text(self, source: Source) -> Secret[str]:
        content = await self._secrets.read(source)
        try:
            return Secret(content.reveal().decode("ascii").strip())
        except UnicodeDecodeError:
            fault = Fault(str(source), "holds something that is not plain text")
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault) from None
