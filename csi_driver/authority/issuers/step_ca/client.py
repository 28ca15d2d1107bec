"""The API of step-ca: typed calls and parsed responses."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from cryptography import x509

from csi_driver.authority.issuers.http_client import HttpClient, HttpError, JsonResponse
from csi_driver.authority.issuers.step_ca.provisioners import Provisioner, parse_provisioners
from csi_driver.core.formats.pem import decode_certificates

_MAX_PAGES = 50  # Of a hundred provisioners each, which is step-ca's own limit for a page
_MAX_CHAIN = 10


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
