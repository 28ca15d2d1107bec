"""Find out by a TLS handshake in memory what OpenSSL thinks of a certificate. Nothing is sent, and nothing is written to a disk."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator, Sequence

from cryptography import x509

from csi_driver.core.certificates.keys import PrivateKey, encode_key
from csi_driver.core.formats.pem import encode_certificates

_MAX_STEPS = 20
Certificates = Sequence[x509.Certificate]


def server_problem(chain: Certificates, key: PrivateKey, roots: Certificates, name: str) -> str:
    """Return why a client that connects to ``name`` rejects a server with this certificate, or an empty text."""
    return _problem(chain, key, roots, name) if name else "the name is empty"


def client_problem(chain: Certificates, key: PrivateKey, roots: Certificates) -> str:
    """Return why a server rejects a client with this certificate, or an empty text."""
    return _problem(chain, key, roots, "")


def _problem(chain: Certificates, key: PrivateKey, roots: Certificates, name: str) -> str:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    verifier = client if name else server
    client.check_hostname = bool(name)
    client.verify_mode, server.verify_mode = (
        (ssl.CERT_REQUIRED, ssl.CERT_NONE) if name else (ssl.CERT_NONE, ssl.CERT_REQUIRED)
    )
    try:
        verifier.load_verify_locations(cadata=encode_certificates(roots).decode("ascii"))
        with _in_memory(encode_certificates(chain) + encode_key(key).reveal()) as file:
            for context in (server, client):
                context.load_cert_chain(file)
        _shake_hands(server, client, name)
    except ssl.SSLCertVerificationError as error:
        return error.verify_message.rstrip(".")
    except ssl.SSLError as error:
        return (error.reason or str(error)).replace("_", " ").lower()
    except (UnicodeError, ValueError, TypeError):  # from the name
        return "the name is not a DNS name or an IP address"
    return ""


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name or None),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(_MAX_STEPS):
        waiting = False
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting = True
        if not waiting:
            return
    raise ssl.SSLError("the handshake does not end")


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """Yield the path of a file that exists in memory only, for a function that needs a path."""
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
