"""Connect to the authority without a token: find out why a TLS handshake fails."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cryptography import x509

from csi_driver.core.addresses import Address, parse_address
from csi_driver.core.clocks import TOLERANCE_S, clock_error
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates, encode_certificates
from csi_driver.core.texts import timestamp

if TYPE_CHECKING:
    import ssl  # Imported when it is needed: with OpenSSL, it takes 4 MB of each node driver's memory.

_TIMEOUT_S = 2.0
_CHECK_TIMEOUT_S = 5.0
_MAX_FLIGHT_BYTES = 16384  # that are read at once in a handshake
_IGNORE_TIMES = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which Python has no name for
BACKDATE_S = 60.0  # the authority's certificates are valid from a minute before they are issued
_RENEWED_BEFORE_EXPIRY = 1 / 3  # of the lifetime: the authority renews its serving certificate


async def find_clock_error(address: str, roots: bytes, node: str, now: Callable[[], float]) -> CertmountError | None:
    """Return ClockSkew if the authority's certificate is valid except for its times, otherwise None.

    It connects without sending a token and verifies the chain to the roots (PEM), but not the times. The certificate shows a
    lower bound of the difference: it was valid for a while when the authority presented it.
    """
    import ssl

    context = _client_context(roots)
    context.verify_flags |= ssl.VerifyFlags(_IGNORE_TIMES)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            certificate = x509.load_der_x509_certificate(await _shake_hands(parse_address(address), context))
    except (OSError, ValueError, TimeoutError):
        return None
    start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    if now() < start:
        ahead, problem = (
            start + BACKDATE_S - now(),
            f"is valid from {timestamp(certificate.not_valid_before_utc)}",
        )
    elif now() > end:
        ahead = now() - end + (end - start) * _RENEWED_BEFORE_EXPIRY
        problem = f"expired at {timestamp(certificate.not_valid_after_utc)}"
    else:
        return None
    if ahead < TOLERANCE_S:
        return None
    return clock_error(node, "the authority", ahead, f"the authority's certificate {problem}", at_least=True)


async def check_connection(address: str, roots: bytes) -> str:
    """Resolve the authority's name, connect and verify its certificate with the roots (PEM), and return its IP addresses.

    No token is sent. Raises CertmountError AuthorityUnavailable, or ClockSkew.
    """
    import ssl

    server = parse_address(address)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(*server, type=socket.SOCK_STREAM)
    except OSError as error:
        hint = "check that the Service exists, and that the cluster's DNS works"
        raise _unavailable(address, f"the name does not resolve: {error.strerror}", hint) from None
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            await _shake_hands(server, _client_context(roots))
    except ssl.SSLCertVerificationError as error:
        clocks = await find_clock_error(address, roots, "this node", time.time)
        raise clocks or _unavailable(address, f"its certificate is rejected: {error.verify_message}") from None
    except TimeoutError:
        hint = "check that its pods are ready, and the NetworkPolicies"
        raise _unavailable(address, f"no connection within {_CHECK_TIMEOUT_S:.0f} s", hint) from None
    except OSError as error:
        problem = os.strerror(error.errno).lower() if error.errno else "none of its addresses can be reached"
        raise _unavailable(address, problem, "check that its pods are ready") from None
    return ", ".join(sorted({str(entry[4][0]) for entry in found}))


async def _shake_hands(server: Address, context: ssl.SSLContext) -> bytes:
    """Return the server's verified certificate (X.509 DER). Not with asyncio's TLS, which needs ``ssl`` at its own import.

    Raises OSError, of which SSLError is a kind.
    """
    import ssl

    reader, writer = await asyncio.open_connection(*server)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname=server.host)
    try:
        while True:
            try:
                connection.do_handshake()
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                await writer.drain()
                if not (received := await reader.read(_MAX_FLIGHT_BYTES)):
                    raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection") from None
                incoming.write(received)
            else:
                return connection.getpeercert(binary_form=True) or b""
    finally:
        writer.close()


def _client_context(roots: bytes) -> ssl.SSLContext:
    import ssl

    # Encoded again, because ssl accepts only ASCII, and the file can have comments in any language.
    certificates = encode_certificates(decode_certificates(roots))
    context = ssl.create_default_context(cadata=certificates.decode("ascii"))
    # Like gRPC, do not require key identifiers, as Python 3.13 and newer do.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["h2"])
    return context


def _unavailable(address: str, problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.AUTHORITY_UNAVAILABLE, Fault(address, problem, hint))
