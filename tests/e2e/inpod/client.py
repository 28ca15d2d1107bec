"""Connects ten times a second by mutual TLS with the current files of its volume; prints its status once a second.

Argument: the server's name. Counting starts after the first response of the server.
"""

import json
import socket
import ssl
import sys
import time
from pathlib import Path

from cryptography import x509

TLS = "/var/run/tls"
PERIOD_S = 0.1
server = sys.argv[1]
own: list[str] = []
servers: list[str] = []
errors: list[str] = []
connections = 0


def serial(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def connect() -> str:
    """Connect once, and return the serial number of the server's certificate."""
    context = ssl.create_default_context(cafile=f"{TLS}/root.crt")
    # OpenSSL opens the file twice, for certificates and key; the descriptor makes sure that both are of one generation.
    with Path(TLS, "site.pem").open("rb") as bundle:
        context.load_cert_chain(f"/proc/self/fd/{bundle.fileno()}")
    with (
        socket.create_connection((server, 8443), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname=server) as connection,
    ):
        connection.sendall(b"hello")
        if connection.recv(100) != b"hello":
            raise OSError("unexpected response")
        presented = connection.getpeercert(binary_form=True)
    return serial(x509.load_der_x509_certificate(presented or b""))


def wait_for_server() -> None:
    while True:
        try:
            connect()
        except OSError:
            time.sleep(0.5)
        else:
            return


wait_for_server()
begin = time.monotonic()
while True:
    time.sleep(max(0.0, begin + connections * PERIOD_S - time.monotonic()))
    connections += 1
    try:
        server_serial = connect()
    except OSError as error:
        errors.append(f"{time.time():.3f} {error!r}")
    else:
        servers += [server_serial] if server_serial not in servers else []
    mine = serial(x509.load_pem_x509_certificate(Path(TLS, "site.crt").read_bytes()))
    own += [mine] if mine not in own else []
    if connections % 10 == 0:
        seconds = round(time.monotonic() - begin, 1)
        status = {"connections": connections, "seconds": seconds, "own": own, "servers": servers, "errors": errors}
        print(json.dumps(status), flush=True)
