"""Serves mutual TLS on port 8443; reads its certificate afresh for each connection, so every generation is shown to someone."""

import socket
import ssl

TLS = "/var/run/tls"


def answer(raw: socket.socket) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{TLS}/site.pem")
    context.load_verify_locations(f"{TLS}/root.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    with context.wrap_socket(raw, server_side=True) as connection:
        connection.sendall(connection.recv(100))


with socket.create_server(("", 8443)) as listener:
    print("serving", flush=True)
    while True:
        accepted, _ = listener.accept()
        accepted.settimeout(5)
        try:
            answer(accepted)
        except OSError as error:
            print(f"error: {error!r}", flush=True)
