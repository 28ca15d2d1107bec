"""A CA with Let's Encrypt's rule: a new order with the names of a pending or ready order of the account is that order."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers.acme.config import AccountStorage, AcmeConfiguration, Http01
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.certificates.csr import names_of
from tests.support.stream_servers import web_server
from tests.unit.authority.issuers.hostile_server import ALWAYS, localhost_tls
from tests.unit.core import pki

_POLLS = 3  # Until an order is ready, so that orders that are processed at the same time overlap
_PROBLEM = "urn:ietf:params:acme:error:"


@dataclass
class RemoteOrder:
    """An order at the CA. All its authorizations are valid."""

    account: str
    names: tuple[str, ...]
    status: str = "pending"
    polls: int = 0
    pem: bytes = b""


class ReusingCA:
    """``reject_orders`` is the code of the problem that makes each order invalid; ``new_orders`` counts the requests."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.url = directory, ""
        self.orders: list[RemoteOrder] = []
        self.new_orders = 0
        self.reject_orders = ""
        self._root = pki.authority("root", validity=ALWAYS)
        self._tls = localhost_tls(self._root, directory)
        self._roots_file = directory / "root.pem"
        self._roots_file.write_bytes(self._root.certificate.public_bytes(Encoding.PEM))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[ReusingCA]:
        async with web_server(self._respond, self._tls) as port:
            self.url = f"https://localhost:{port}"
            yield self

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(self.directory / "store", "acme.json")

    def issuer(self) -> AcmeIssuer:
        """Return a replica of the issuer; all of them share one store."""
        account, file = AccountStorage(directory=str(self.directory / "store")), str(self._roots_file)
        configuration = AcmeConfiguration(
            account, directory=f"{self.url}/dir", ca_file=file, roots_file=file, http01=Http01()
        )
        return AcmeIssuer("ca", configuration, self.store, wait_s=2, lease_s=1)

    def finalize(self, number: int, csr: bytes) -> None:
        order, request = self.orders[number], x509.load_der_x509_csr(csr)
        names = pki.names(*(name.text for name in names_of(request.extensions)))
        certificate = pki.leaf(self._root, request, names, validity=ALWAYS)  # type: ignore[arg-type]  # has public_key()
        order.status, order.pem = "valid", certificate.public_bytes(Encoding.PEM)

    async def _respond(self, request: web.Request) -> web.Response:
        kind, _, number = request.path.strip("/").partition("/")
        headers = {"Replay-Nonce": "bm9uY2U", "Retry-After": "0"}
        protected, payload = _opened(await request.read())
        document: Any = {"status": "valid"}
        if kind == "dir":
            document = {name: f"{self.url}/{name}" for name in ("newNonce", "newAccount", "newOrder")}
        elif kind == "newAccount":
            key = hashlib.sha256(json.dumps(protected["jwk"], sort_keys=True).encode()).hexdigest()
            headers["Location"] = f"{self.url}/account/{key}"
        elif kind == "newOrder":
            names = tuple(one["value"] for one in payload["identifiers"])
            headers["Location"] = f"{self.url}/order/{self._order(protected['kid'], names)}"
        elif kind == "order":
            document = self._polled(int(number))
        elif kind == "authorization":
            name = self.orders[int(number)].names[0]
            document = {"status": "valid", "identifier": {"type": "dns", "value": name}, "challenges": []}
        elif kind == "finalize":
            if self.orders[int(number)].status != "ready":
                problem = {"type": f"{_PROBLEM}orderNotReady", "detail": "the order is not ready"}
                return web.json_response(problem, status=403, headers=headers)
            self.finalize(int(number), _decode(payload["csr"]))
        elif kind == "certificate":
            return web.Response(body=self.orders[int(number)].pem, headers=headers)
        return web.json_response(document, headers=headers)

    def _order(self, account: str, names: tuple[str, ...]) -> int:
        self.new_orders += 1
        for number, one in enumerate(self.orders):
            if (one.account, one.names) == (account, names) and one.status in ("pending", "ready"):
                return number
        self.orders.append(RemoteOrder(account, names))
        return len(self.orders) - 1

    def _polled(self, number: int) -> dict[str, Any]:
        order = self.orders[number]
        order.polls += 1
        if order.status == "pending" and order.polls > _POLLS:
            order.status = "invalid" if self.reject_orders else "ready"
        document: dict[str, Any] = {
            "status": order.status,
            "authorizations": [f"{self.url}/authorization/{number}"],
            "finalize": f"{self.url}/finalize/{number}",
        }
        if order.status == "valid":
            document["certificate"] = f"{self.url}/certificate/{number}"
        if order.status == "invalid":
            document["error"] = {"type": f"{_PROBLEM}{self.reject_orders}", "detail": "no such record"}
        return document


def _opened(body: bytes) -> tuple[dict[str, Any], Any]:
    """Return the protected header and the payload of a request (RFC 8555 section 6.2), without verifying it."""
    if not body:
        return {}, None
    message = json.loads(body)
    payload = _decode(message["payload"])
    return json.loads(_decode(message["protected"])), json.loads(payload) if payload else None


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
