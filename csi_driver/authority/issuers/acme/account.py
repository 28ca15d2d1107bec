"""The ACME account (RFC 8555 section 7.3): one for each directory and email address; the store keeps its key."""

from __future__ import annotations

import asyncio
import hashlib
import json
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

from acme import messages
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.errors import Error as JoseError
from josepy.jwk import JWKEC

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.acme.client import AcmeClient, AcmeProblem
from csi_driver.authority.issuers.acme.config import AcmeConfiguration
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.storage import Store, Values, update
from csi_driver.core.secret import Secret, StoredSecrets


@dataclass(frozen=True, slots=True)
class AcmeAccount:
    """The account's key, and its URL at the CA."""

    key: JWKEC = field(repr=False)
    url: str  # Empty until the CA knows the key


@dataclass(eq=False)
class AcmeAccounts:
    """Finds or creates the account of an issuer when it is first needed."""

    configuration: AcmeConfiguration
    credentials: CredentialReader
    store: Store
    executor: Executor

    def __post_init__(self) -> None:
        identity = f"{self.configuration.directory}\n{self.configuration.email or ''}"
        self._value = f"account-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"
        self._account: AcmeAccount | None = None
        self._directory: messages.Directory | None = None
        self._connecting = asyncio.Lock()

    async def connect(self) -> AcmeClient:
        async with self._connecting:
            if self._account is None:
                try:
                    self._account = await self._register()
                except AcmeProblem as problem:
                    text = f"{self.configuration.directory} rejected the account: {problem.text}"
                    raise issuer_unavailable("ACME account", text) from None
        client = self._client(self._account.key)
        client.use_account(self._account.url)
        return client

    async def refresh_directory(self) -> None:
        client = await self.connect()
        self._directory = await asyncio.get_running_loop().run_in_executor(self.executor, client.fetch_directory)

    def forget(self) -> None:
        self._account = None

    def _client(self, key: JWKEC) -> AcmeClient:
        return AcmeClient(self.configuration.directory, key, self.configuration.ca_file, self._directory)

    async def _register(self) -> AcmeAccount:
        # Register even if the URL is known, so that a deactivated account is reported at the start.
        account = await update(self.store, self._load_or_create)
        client = self._client(account.key)
        external = self.configuration.external_account
        mac_key = None if external is None else await self.credentials.read_text(external.key)
        call = partial(register, client, account.key, self.configuration, mac_key)
        url = await asyncio.get_running_loop().run_in_executor(self.executor, call)
        self._directory = client.directory
        if url == account.url:
            return account
        registered = AcmeAccount(account.key, url)

        async def save(stored: StoredSecrets) -> tuple[Values, None]:
            return {**stored.values, self._value: _encode(registered)}, None

        await update(self.store, save)
        return registered

    async def _load_or_create(self, stored: StoredSecrets) -> tuple[Values | None, AcmeAccount]:
        # The key is stored before the CA gets it, so that two replicas that start together use one account.
        if self._value in stored.values:
            return None, _decode(stored.values[self._value], self.store.name, self._value)
        account = AcmeAccount(JWKEC(key=ec.generate_private_key(ec.SECP256R1())), "")
        return {**stored.values, self._value: _encode(account)}, account


def register(client: AcmeClient, key: JWKEC, configuration: AcmeConfiguration, mac_key: Secret[str] | None) -> str:
    """Return the URL of the account for the key, created if necessary; raise as :meth:`AcmeClient.send`."""
    directory = client.directory
    terms = directory.meta.terms_of_service
    if terms and not configuration.terms_agreed:
        problem = f"the CA requires agreement to its terms of service, {terms}"
        raise issuer_unavailable("acme.terms_agreed", problem, "read them and set terms_agreed: true")
    external = configuration.external_account
    if directory.meta.external_account_required and external is None:
        hint = "set acme.eab to the key id and MAC key that the CA gives to its customers"
        raise issuer_unavailable("acme.eab", "the CA requires an external account", hint)
    binding = None
    if external is not None and mac_key is not None:
        try:
            bind = messages.ExternalAccountBinding.from_data
            binding = bind(key.public_key(), external.key_id, mac_key.reveal(), directory)
        except ValueError:  # including binascii.Error
            raise issuer_unavailable("acme.eab.key", "is not base64url, the format of MAC keys") from None
    create = messages.NewRegistration.from_data
    body = create(email=configuration.email, terms_of_service_agreed=True, external_account_binding=binding)
    url: str | None = client.send(directory["newAccount"], body).headers.get("Location")
    if not url:
        raise AcmeProblem("", "the response to a new account lacks its URL")
    return url


def _encode(account: AcmeAccount) -> Secret[bytes]:
    return Secret(json.dumps({"key": account.key.to_json(), "url": account.url}).encode("ascii"))


def _decode(value: Secret[bytes], store: str, name: str) -> AcmeAccount:
    try:
        document = json.loads(value.reveal())
        key, url = JWKEC.from_json(document["key"]), str(document["url"])
    except (ValueError, TypeError, KeyError, JoseError):
        key, url = None, ""
    if not isinstance(key, JWKEC):
        hint = "restore it, or remove it to create a new account"
        raise issuer_unavailable(f"{store}: {name}", "is not an account key", hint)
    return AcmeAccount(key, url)
