"""Serves mutual TLS on port 8443; reads its certificate again for each connection, so that clients see every generation.

With the argument "optional", clients without a certificate are also served.
"""

import socket
import ssl
import sys
from pathlib import Path

TLS = "/var/run/tls"


def answer(raw: socket.socket) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # OpenSSL opens the file twice, for certificates and key; the descriptor makes sure that both are of one generation.
    with Path(TLS, "site.pem").open("rb") as bundle:
        context.load_cert_chain(f"/proc/self/fd/{bundle.fileno()}")
    context.load_verify_locations(f"{TLS}/root.crt")
    context.verify_mode = ssl.CERT_OPTIONAL if sys.argv[1:] == ["optional"] else ssl.CERT_REQUIRED
    with context.wrap_socket(raw, server_side=True) as connection:
        connection.sendall(connection.recv(100))


with socket.create_server(("", 8443)) as listener:
    print("serving", flush=True)
    while True:
        accepted, _ = listener.accept()
        accepted.settimeout(5)
        try:
            with accepted:
                answer(accepted)
        except OSError as error:
            print(f"error: {error!r}", flush=True)
