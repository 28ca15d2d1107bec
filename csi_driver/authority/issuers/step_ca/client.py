"""The API of step-ca: typed calls and parsed responses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from csi_driver.authority.issuers.http_client import HttpClient, HttpError, JsonResponse
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.provisioners import Provisioner, parse_provisioners
from csi_driver.core.formats.pem import decode_certificates

_MAX_PAGES = 50  # Of a hundred provisioners each, which is step-ca's own limit for a page
_MAX_CHAIN = 10
_MAX_ROOT_FILE_BYTES = 1024 * 1024


class StepCAClient(HttpClient):
    """Calls one step-ca. Methods raise HttpError."""

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
        certificates = parse_pems(pems)
        if len(certificates) != len(pems):
            raise HttpError("roots", f"{path} returned an invalid certificate")
        return certificates

    async def provisioners(self) -> Sequence[Provisioner]:
        provisioners: list[Provisioner] = []
        cursor = ""
        for _ in range(_MAX_PAGES):
            response = await self.request("GET", f"/provisioners?limit=100&cursor={quote(cursor)}")
            if response.status != 200:
                raise _unexpected("provisioner", "/provisioners", response)
            provisioners += parse_provisioners(response.document)
            cursor = str(response.document.get("nextCursor") or "")
            if not cursor:
                break
        return provisioners

    async def sign(self, csr: str, token: str, lifetime: str) -> JsonResponse:
        """Request a certificate. The token is used up even if the call fails."""
        return await self.request("POST", "/1.0/sign", {"csr": csr, "ott": token, "notAfter": lifetime})


def parse_signed_chain(response: JsonResponse) -> list[x509.Certificate]:
    pems = response.document.get("certChain")
    chain = parse_pems(pems) if isinstance(pems, list) else []
    return chain if isinstance(pems, list) and len(chain) == len(pems) <= _MAX_CHAIN else []


def parse_pems(pems: Sequence[object]) -> list[x509.Certificate]:
    certificates: list[x509.Certificate] = []
    for pem in pems:
        try:
            certificates += decode_certificates(pem.encode())[:1] if isinstance(pem, str) else []
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
        with Path(file).open("rb") as opened:
            content = opened.read(_MAX_ROOT_FILE_BYTES + 1)
        if len(content) <= _MAX_ROOT_FILE_BYTES:
            return tuple(decode_certificates(content))
        problem = f"is longer than {_MAX_ROOT_FILE_BYTES} bytes"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValueError:
        problem = "does not contain valid certificates in PEM"
    raise HttpError("root", f"file {file} {problem}")
