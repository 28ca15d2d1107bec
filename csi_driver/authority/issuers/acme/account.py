"""The account at the CA (RFC 8555 section 7.3): one for each directory and e-mail, its key kept in the store."""

from __future__ import annotations

import asyncio
import hashlib
import json
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from acme import messages
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.errors import Error as JoseError
from josepy.jwk import JWKEC

from csi_driver.authority.issuers.acme.client import CaProblem, Connection
from csi_driver.authority.issuers.acme.credentials import Credentials
from csi_driver.authority.issuers.acme.settings import AcmeSettings
from csi_driver.authority.storage import Store
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret


@dataclass(frozen=True, slots=True)
class Account:
    """Who we are to the CA."""

    key: JWKEC
    url: str
    """Empty before the CA knows the key."""

    def __repr__(self) -> str:
        return f"Account({self.url})"


class Accounts:
    """The account of an issuer: found, or made at first need."""

    def __init__(self, settings: AcmeSettings, credentials: Credentials, store: Store, executor: Executor) -> None:
        self._settings = settings
        self._credentials = credentials
        self._store = store
        self._executor = executor
        mark = hashlib.sha256(f"{settings.directory}\n{settings.email or ''}".encode()).hexdigest()[:12]
        self._value = f"account-{mark}.json"
        self._account: Account | None = None
        self._directory: messages.Directory | None = None
        self._finding = asyncio.Lock()

    async def connect(self) -> Connection:
        """A connection that signs as the account; raises CertmountError IssuerUnavailable, also where the CA refuses the account."""
        async with self._finding:
            if self._account is None:
                try:
                    self._account = await self._found()
                except CaProblem as problem:
                    fault = Fault("ACME account", f"{self._settings.directory} refuses it: {problem.text}")
                    raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault) from None
        settings = self._settings
        connection = Connection(settings.directory, self._account.key, settings.ca_file, self._directory)
        connection.use_account(self._account.url)
        return connection

    async def look(self) -> None:
        """Fetches the CA's directory anew, for the connections to come; raises CertmountError or CaProblem."""
        connection = await self.connect()
        self._directory = await asyncio.get_running_loop().run_in_executor(self._executor, connection.load_directory)

    def forget(self) -> None:
        """Asks the CA again about the key before its next use: it has said that it doesn't know the account."""
        self._account = None

    async def _found(self) -> Account:
        account = await self._kept()
        # The CA is asked on each start even where the URL is known: an account that was deactivated says so here.
        connection = Connection(self._settings.directory, account.key, self._settings.ca_file)
        loop = asyncio.get_running_loop()
        mac_key = await self._credentials.mac_key()
        call = partial(register, connection, account.key, self._settings, mac_key)
        url = await loop.run_in_executor(self._executor, call)
        self._directory = connection.directory
        if url != account.url:
            await self._keep(account.key, url)
        return Account(account.key, url)

    async def _kept(self) -> Account:
        """The key in the store, which is there before the CA hears of it: so two replicas that start at once are one account."""
        while True:
            stored = await self._store.load()
            if self._value in stored.values:
                return _read(stored.values[self._value], self._store.name, self._value)
            key = JWKEC(key=ec.generate_private_key(ec.SECP256R1()))
            if await self._store.save({**stored.values, self._value: _written(key, "")}, stored):
                return Account(key, "")

    async def _keep(self, key: JWKEC, url: str) -> None:
        while True:
            stored = await self._store.load()
            if await self._store.save({**stored.values, self._value: _written(key, url)}, stored):
                return


def register(connection: Connection, key: JWKEC, settings: AcmeSettings, mac_key: Secret[str] | None) -> str:
    """The account's URL, made where the CA has none for the key (RFC 8555 section 7.3.1).

    Raises:
        CertmountError: IssuerUnavailable where the CA wants terms agreed to, or an account bound, that settings don't hold.
        CaProblem: as the CA says.
    """
    directory = connection.directory
    terms = directory.meta.terms_of_service
    if terms and not settings.terms_agreed:
        hint = "read them, then say terms_agreed: true"
        fault = Fault("acme.terms_agreed", f"the CA issues only to who agrees to its terms of service, {terms}", hint)
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault)
    if directory.meta.external_account_required and settings.external_account is None:
        hint = "it gives a key id and a MAC key to customers; set acme.eab"
        raise CertmountError(
            Reason.ISSUER_UNAVAILABLE, Fault("acme.eab", "the CA knows its accounts by other means", hint)
        )
    body = messages.NewRegistration.from_data(
        email=settings.email,
        terms_of_service_agreed=True,
        external_account_binding=_binding(directory, key, settings, mac_key),
    )
    url: str | None = connection.send(directory["newAccount"], body).headers.get("Location")
    if not url:
        raise CaProblem("", "answers a request for an account without saying which")
    return url


def _binding(
    directory: messages.Directory, key: JWKEC, settings: AcmeSettings, mac_key: Secret[str] | None
) -> dict[str, object] | None:
    external = settings.external_account
    if external is None or mac_key is None:
        return None
    try:
        return messages.ExternalAccountBinding.from_data(key.public_key(), external.key_id, mac_key.reveal(), directory)
    except ValueError:  # binascii.Error among them
        fault = Fault("acme.eab.key", "is not base64url, which is how CAs hand out MAC keys")
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault) from None


def _written(key: JWKEC, url: str) -> Secret[bytes]:
    return Secret(json.dumps({"key": key.to_json(), "url": url}).encode("ascii"))


def _read(value: Secret[bytes], where: str, name: str) -> Account:
    try:
        document = json.loads(value.reveal())
        key, url = JWKEC.from_json(document["key"]), str(document["url"])
    except (ValueError, TypeError, KeyError, JoseError):
        key, url = None, ""
    if not isinstance(key, JWKEC):
        fault = Fault(f"{where}: {name}", "is not an account key", "restore it, or remove it to have a new account")
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault)
    return Account(key, url)
