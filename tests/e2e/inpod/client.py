"""Connects by mutual TLS with the current files of its volume; prints each failure, and its status once a second.

Arguments: the server's name, the connections per second, and "root-only" if the volume has no certificate. Counting starts
after the first response of the server.
"""

import json
import socket
import ssl
import sys
import time
from pathlib import Path

from cryptography import x509

TLS = "/var/run/tls"
MAX_LISTED = 20
server, rate, root_only = sys.argv[1], float(sys.argv[2]), sys.argv[3:] == ["root-only"]
own, servers, errors = list[str](), list[str](), list[str]()
connections = failures = 0
phases, addresses = list[str](), list[str]()


def serial(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def connect() -> str:
    """Connect once, and return the serial number of the server's certificate. The last of ``phases`` says how far it came."""
    phases[:] = ["files"]
    context = ssl.create_default_context(cafile=f"{TLS}/root.crt")
    if not root_only:
        # OpenSSL opens the file twice, for certificates and key; the descriptor makes sure that both are of one generation.
        with Path(TLS, "site.pem").open("rb") as bundle:
            context.load_cert_chain(f"/proc/self/fd/{bundle.fileno()}")
    phases.append("connect")
    with socket.create_connection((addresses[0], 8443), timeout=10) as raw:
        phases.append("handshake")
        with context.wrap_socket(raw, server_hostname=server) as connection:
            connection.sendall(b"hello")
            if connection.recv(100) != b"hello":
                raise ConnectionResetError("no response")
            presented = connection.getpeercert(binary_form=True)
    return serial(x509.load_der_x509_certificate(presented or b""))


def own_serial() -> str:
    return serial(x509.load_pem_x509_certificate(Path(TLS, "site.crt").read_bytes()))


def answers() -> bool:
    try:
        # Once only, because an outage of DNS must not hide what happens to connections.
        addresses[:] = [socket.gethostbyname(server)]
        return bool(connect())
    except OSError:
        return False


while not answers():
    time.sleep(0.5)  # between attempts to connect
begin = planned = reported = time.monotonic()
while True:
    # After a slow connection, the next ones do not hurry to make up for it.
    planned = max(planned + 1 / rate, time.monotonic() - 1)
    time.sleep(max(0.0, planned - time.monotonic()))
    connections += 1
    try:
        server_serial = connect()
        servers += [server_serial] if server_serial not in servers else []
        phases.append("files")
        mine = "" if root_only else own_serial()
        own += [mine] if mine and mine not in own else []
    except (OSError, ValueError) as error:
        failures += 1
        reported = 0.0
        failure = {"time": time.time(), "phase": phases[-1], "class": type(error).__name__, "error": str(error)}
        errors = [*errors, f"{phases[-1]}: {error!r}"][-MAX_LISTED:]
        print(json.dumps({"failure": failure}), flush=True)
    now = time.monotonic()
    if now - reported >= 1:
        reported = now
        renewals = {"own": own[-MAX_LISTED:], "servers": servers[-MAX_LISTED:], "renewals": max(len(own) - 1, 0)}
        counts = {"connections": connections, "failures": failures, "seconds": round(now - begin, 1)}
        print(json.dumps({**counts, **renewals, "errors": errors}), flush=True)
