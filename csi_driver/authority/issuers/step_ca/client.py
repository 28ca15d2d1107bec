"""The API of step-ca: typed calls and parsed responses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from csi_driver.authority.config.watched_file import read_regular_file
from csi_driver.authority.issuers.external_issuer import MAX_CHAIN
from csi_driver.authority.issuers.http_client import (
    EXPIRED,
    OTHER_NAME,
    UNKNOWN_ROOT,
    HttpClient,
    HttpError,
    JsonResponse,
    tls_context,
)
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.provisioners import MAX_LISTED, Provisioner, parse_provisioners
from csi_driver.core.formats.pem import decode_certificates

_PAGE, _MAX_PAGES, _MAX_PAGES_S = 20, 100, 60.0  # step-ca sends at most a hundred provisioners in a page
_MAX_CURSOR_LENGTH = 200
_MAX_PEM_BYTES = 64 * 1024  # Of one certificate
MAX_ROOTS = 10  # A volume can hold as many
_MAX_ROOT_FILE_BYTES = 1024 * 1024


class StepCAClient(HttpClient):
    """Calls one step-ca. Methods raise HttpError. If ``roots`` is None, the caller must verify the response."""

    hints: ClassVar[Mapping[int, str]] = {
        **HttpClient.hints,
        EXPIRED: "renew the server's certificate; step-ca does so when it restarts",
        UNKNOWN_ROOT: "compare root or root_sha256 with `step certificate fingerprint root_ca.crt`",
        OTHER_NAME: 'add the name to "dnsNames" in ca.json, or change url to a name that is listed',
    }

    def __init__(self, url: str, roots: tuple[x509.Certificate, ...] | None) -> None:
        super().__init__(tls_context(roots), url)

    async def health(self) -> JsonResponse:
        response = await self.request("GET", "/health")
        if response.status != 200 or response.document.get("status") != "ok":
            raise _unexpected("reachable", "/health", response)
        return response

    async def root(self, sha256: str) -> Sequence[x509.Certificate] | None:
        response = await self.request("GET", f"/root/{sha256}")
        return None if response.status == 404 else parse_pems([response.document.get("ca")])

    async def roots(self, path: str) -> Sequence[x509.Certificate]:
        response = await self.request("GET", path)
        pems = response.document.get("crts")
        if response.status not in (200, 201) or not isinstance(pems, list):
            raise _unexpected("roots", path, response)
        if len(pems) > MAX_ROOTS:
            raise HttpError("roots", f"step-ca publishes {len(pems)} roots at {path}; expected at most {MAX_ROOTS}")
        certificates = parse_pems(pems)
        if len(certificates) != len(pems):
            raise HttpError("roots", f"{path} returned an invalid certificate")
        return certificates

    async def provisioners(self, name: str) -> Sequence[Provisioner]:
        """Return the provisioners up to the page with this name, and of those with other names only the first few."""
        found: list[Provisioner] = []
        cursor = ""
        deadline = asyncio.get_running_loop().time() + _MAX_PAGES_S
        for _ in range(_MAX_PAGES):
            response = await self.request("GET", f"/provisioners?limit={_PAGE}&cursor={quote(cursor)}")
            if response.status != 200:
                raise _unexpected("provisioner", "/provisioners", response)
            page = list(parse_provisioners(response.document))
            others = [one for one in page if one.name != name]
            found += [one for one in page if one.name == name] + others[: max(0, MAX_LISTED + 1 - len(found))]
            cursor = str(response.document.get("nextCursor") or "")
            if not cursor or any(one.name == name for one in page):
                return found
            if len(cursor) > _MAX_CURSOR_LENGTH or asyncio.get_running_loop().time() > deadline:
                break
        problem = (
            f"/provisioners has more than {_MAX_PAGES} pages of {_PAGE}, or takes longer than {_MAX_PAGES_S:.0f} s"
        )
        raise HttpError("provisioner", problem)

    async def sign(self, csr: str, token: str, lifetime: str) -> JsonResponse:
        """Request a certificate. The token is used up even if the call fails."""
        return await self.request("POST", "/1.0/sign", {"csr": csr, "ott": token, "notAfter": lifetime})


def parse_signed_chain(response: JsonResponse) -> list[x509.Certificate]:
    """Return the certificates of a response, or none if one of them is not valid or if there are too many."""
    pems = response.document.get("certChain")
    if not isinstance(pems, list) or len(pems) > MAX_CHAIN:
        return []
    chain = parse_pems(pems)
    return chain if len(chain) == len(pems) else []


def parse_pems(pems: Sequence[object]) -> list[x509.Certificate]:
    """Return the certificates, one of each text; skip texts that are not one certificate."""
    certificates: list[x509.Certificate] = []
    for pem in pems:
        if not isinstance(pem, str) or len(pem) > _MAX_PEM_BYTES or pem.count("-----BEGIN") != 1:
            continue
        try:
            certificates += decode_certificates(pem.encode())
        except ValueError:
            continue
    return certificates


def _unexpected(subject: str, path: str, response: JsonResponse) -> HttpError:
    return HttpError(subject, f"{path} returned HTTP {response.status} {response.message}".rstrip())


async def fetch_pinned_roots(configuration: StepCAConfiguration) -> tuple[x509.Certificate, ...]:
    """Return the roots of the file, or the root with the fingerprint, which verify step-ca's TLS certificate; raise HttpError."""
    if configuration.root_file is not None:
        return await asyncio.to_thread(_read_roots, configuration.root_file)
    sha256 = configuration.root_sha256 or ""
    async with contextlib.aclosing(StepCAClient(configuration.url, None)) as client:
        roots = await client.root(sha256)
    if roots is None:
        hint = "run `step certificate fingerprint root_ca.crt` on step-ca's machine for the current fingerprint"
        raise HttpError("root", f"step-ca has no root with the SHA-256 {sha256}", hint)
    # The connection is not verified yet, so the certificate must prove itself by its hash.
    if len(roots) != 1 or roots[0].fingerprint(SHA256()).hex() != sha256:
        raise HttpError("root", f"the server did not return a root with the SHA-256 {sha256}", "check url")
    return tuple(roots)


def _read_roots(file: str) -> tuple[x509.Certificate, ...]:
    try:
        content = read_regular_file(Path(file), _MAX_ROOT_FILE_BYTES)
        if len(content) <= _MAX_ROOT_FILE_BYTES:
            return tuple(decode_certificates(content))
        problem = f"is longer than {_MAX_ROOT_FILE_BYTES} bytes"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValueError:
        problem = "does not contain valid certificates in PEM"
    raise HttpError("root", f"file {file} {problem}")
