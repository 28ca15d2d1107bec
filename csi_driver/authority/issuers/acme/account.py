"""The ACME accounts (RFC 8555 section 7.3): one for each directory and email address; the store keeps their keys."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from acme import messages
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.errors import Error as JoseError
from josepy.jwk import JWKEC

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.acme.client import AcmeClient, AcmeProblem, check_url, open_client
from csi_driver.authority.issuers.acme.config import AcmeConfiguration, ExternalAccount
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.issuers.http_client import MAX_URL_LENGTH
from csi_driver.authority.issuers.key_encoding import decode_base64, encode_base64url, is_encoded_twice, is_hexadecimal
from csi_driver.authority.storage import Store, Values, update
from csi_driver.core.bounded_json import loads_bounded
from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret, StoredSecrets
from csi_driver.core.shares import FairShares

MAX_ACCOUNTS = 100
"""Accounts that requests for Secrets created. The Secret that stores them, 400 bytes each, also has the orders."""
_MAX_BYTES = 16 * 1024
_PREFIX = "account-"
_EAB_KEY = "acme.eab.key"
_MIN_KEY_BYTES = 16
_NOT_ACCEPTED = ("", "malformed", "unauthorized", "externalAccountRequired")


@dataclass(frozen=True, slots=True)
class AcmeAccount:
    """The account's key, and its URL at the CA."""

    key: JWKEC = field(repr=False)
    url: str = ""  # Empty until the CA knows the key
    namespace: str = ""  # Of the Secret whose request created it; empty for the issuer's own account


class _Connection:
    """An account that this replica has registered, or registers now."""

    def __init__(self) -> None:
        self.account: AcmeAccount | None = None
        self.lock = asyncio.Lock()


@dataclass(eq=False)
class AcmeAccounts:
    """Finds or creates the accounts of an issuer when they are first needed. An empty email means the issuer's own account."""

    configuration: AcmeConfiguration
    credentials: CredentialReader
    store: Store

    def __post_init__(self) -> None:
        self._connections: dict[str, _Connection] = {}
        self._directory: messages.Directory | None = None

    async def create(self, email: str, namespace: str) -> None:
        """Store a key for the account if it has none; raise CertmountError ShareExceeded. The CA gets the key later."""
        if email:
            await update(self.store, functools.partial(self._load_or_create, email=email, namespace=namespace))

    @asynccontextmanager
    async def connect(self, email: str = "") -> AsyncIterator[AcmeClient]:
        """Open a client that uses the account; raise AcmeProblem or CertmountError."""
        connection = self._connections.setdefault(email, _Connection())
        async with connection.lock:
            if connection.account is None:
                try:
                    connection.account = await self._register(email)
                except AcmeProblem as problem:
                    raise self._rejected(email, problem) from None
            account = connection.account
        async with self._open(account.key) as client:
            client.use_account(account.url)
            yield client

    async def refresh_directory(self) -> None:
        async with self.connect() as client:
            self._directory = await client.fetch_directory()

    def forget(self, email: str) -> None:
        self._connections.pop(email, None)

    def _rejected(self, email: str, problem: AcmeProblem) -> Exception:
        """Return what the orders of the account get. An address of a request can be wrong, so the CA's error then counts."""
        if not email:
            text = f"{self.configuration.directory} rejected the account: {problem.text}"
            return issuer_unavailable("ACME account", text)
        text = f"{self.configuration.directory} rejected the account of {email}: {problem.text}"
        return AcmeProblem(problem.code, text, problem.status, problem.retry_after_s)

    def _open(self, key: JWKEC) -> AbstractAsyncContextManager[AcmeClient]:
        return open_client(self.configuration.directory, key, self.configuration.ca_file, self._directory)

    async def _register(self, email: str) -> AcmeAccount:
        # Register even if the URL is known, so that a deactivated account is reported at the start.
        account = await update(self.store, functools.partial(self._load_or_create, email=email))
        external = self.configuration.external_account
        mac_key = None if external is None else await self.credentials.read_text(external.key)
        async with self._open(account.key) as client:
            configuration = replace(self.configuration, email=email) if email else self.configuration
            url = await register(client, account.key, configuration, mac_key)
            self._directory = client.directory
        if url == account.url:
            return account
        registered = replace(account, url=url)

        async def save(stored: StoredSecrets) -> tuple[Values, None]:
            return {**stored.values, self._value(email): _encode(registered)}, None

        await update(self.store, save)
        return registered

    async def _load_or_create(
        self, stored: StoredSecrets, email: str, namespace: str = ""
    ) -> tuple[Values | None, AcmeAccount]:
        # The key is stored before the CA gets it, so that two replicas that start together use one account.
        value = self._value(email)
        if value in stored.values:
            return None, _decode(stored.values[value], self.store.name, value)
        if namespace:
            self._check_share(stored, namespace)
        account = AcmeAccount(JWKEC(key=ec.generate_private_key(ec.SECP256R1())), namespace=namespace)
        return {**stored.values, value: _encode(account)}, account

    def _value(self, email: str) -> str:
        identity = f"{self.configuration.directory}\n{email or self.configuration.email or ''}"
        return f"{_PREFIX}{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"

    def _check_share(self, stored: StoredSecrets, namespace: str) -> None:
        hint = f"use an address that has an account, or ask an administrator to remove accounts from {self.store.name}"
        shares = FairShares("ACME accounts of the issuer", MAX_ACCOUNTS, hint=hint)
        for name, value in stored.values.items():
            if name.startswith(_PREFIX) and (owner := _decode(value, self.store.name, name).namespace):
                shares.count((f"namespace {owner}",))
        shares.take((f"namespace {namespace}",))


async def register(
    client: AcmeClient, key: JWKEC, configuration: AcmeConfiguration, mac_key: Secret[str] | None
) -> str:
    """Return the URL of the account for the key, created if necessary; raise as :meth:`AcmeClient.send`."""
    directory = client.directory
    terms = directory.meta.terms_of_service
    if terms and not configuration.terms_agreed:
        problem = f"the CA requires agreement to its terms of service, {terms[:MAX_URL_LENGTH]}"
        raise issuer_unavailable("acme.terms_agreed", problem, "read them and set terms_agreed: true")
    external = configuration.external_account
    if directory.meta.external_account_required and external is None:
        hint = "set acme.eab to the key id and MAC key that the CA gives to its customers"
        raise issuer_unavailable("acme.eab", "the CA requires an external account", hint)
    binding = None
    if external is not None and mac_key is not None:
        binding = _bind(key, external, mac_key, directory)
    create = messages.NewRegistration.from_data
    body = create(email=configuration.email, terms_of_service_agreed=True, external_account_binding=binding)
    try:
        url = (await client.send(directory["newAccount"], body)).headers.get("Location")
    except AcmeProblem as problem:
        if external is None or mac_key is None:
            raise
        rejected = _binding_rejected(external, mac_key, problem.code, problem.text, configuration.directory)
        raise rejected or problem from None
    if not url:
        raise AcmeProblem("", "the response to a new account lacks its URL")
    return check_url(url)


def _bind(key: JWKEC, external: ExternalAccount, mac_key: Secret[str], directory: messages.Directory) -> Any:
    """Return the signed binding. The MAC key is base64url or base64, with or without padding; raise CertmountError."""
    try:
        decoded = decode_base64(mac_key.reveal())
    except ValueError:  # including binascii.Error
        hint = "copy the key as the CA shows it"
        raise issuer_unavailable(_EAB_KEY, f"{external.key} is not base64url, the format of MAC keys", hint) from None
    return messages.ExternalAccountBinding.from_data(
        key.public_key(), external.key_id, encode_base64url(decoded), directory
    )


def _binding_rejected(
    external: ExternalAccount, mac_key: Secret[str], code: str, text: str, directory: str
) -> CertmountError | None:
    """Return the error for a new account that the CA rejected; None if the binding is not the likely cause."""
    if code not in _NOT_ACCEPTED:
        return None
    problem = f"{directory} rejected the account with {external.key} and key_id {external.key_id}: {text}"
    return issuer_unavailable(_EAB_KEY, problem, _key_hint(mac_key.reveal()))


def _key_hint(text: str) -> str:
    decoded = decode_base64(text)
    if is_hexadecimal(text):
        return "the key is hexadecimal; convert it to base64url with `xxd -r -p | basenc --base64url`"
    if is_encoded_twice(decoded):
        return "the key is encoded twice with base64; store the decoded text: `kubectl create secret` encodes it itself"
    if len(decoded) < _MIN_KEY_BYTES:
        return f"the key has only {len(decoded)} bytes; copy the complete key that the CA shows"
    return "compare key_id and key with what the CA shows; a CA can also accept each key only once"


def _encode(account: AcmeAccount) -> Secret[bytes]:
    document = {"key": account.key.to_json(), "url": account.url, "namespace": account.namespace}
    return Secret(json.dumps(document).encode("ascii"))


def _decode(value: Secret[bytes], store: str, name: str) -> AcmeAccount:
    try:
        document = loads_bounded(value.reveal(), max_bytes=_MAX_BYTES)
        key, url, namespace = JWKEC.from_json(document["key"]), str(document["url"]), str(document["namespace"])
    except (ValueError, TypeError, KeyError, JoseError):
        key, url, namespace = None, "", ""
    if not isinstance(key, JWKEC):
        hint = "restore it, or remove it to create a new account"
        raise issuer_unavailable(f"{store}: {name}", "is not an account key", hint)
    return AcmeAccount(key, url, namespace)
