import os
import ssl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Certificate:
    """Loads the files once for each generation."""

    generation = context = None

    def newest(self):
        generation = os.readlink("/var/run/tls/..data")
        if generation != self.generation:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile="/var/run/tls/root.crt")
            context.verify_mode = ssl.CERT_REQUIRED
            # Without tickets: when a session is resumed, OpenSSL does not verify the client's certificate again.
            context.minimum_version, context.num_tickets = ssl.TLSVersion.TLSv1_3, 0
            with open("/var/run/tls/site.pem") as file:
                context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
            self.context, self.generation = context, generation
        return self.context


class Handler(BaseHTTPRequestHandler):
    timeout = 10

    def do_GET(self):
        names = dict(self.connection.getpeercert().get("subjectAltName", ()))
        if "URI" in names:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"hello {names['URI']}\n".encode())
        else:
            self.send_error(403)


def use_newest(connection, _name, _context):
    connection.context = certificate.newest()


certificate = Certificate()
context = certificate.newest()
context.sni_callback = use_newest
server = ThreadingHTTPServer(("", 8443), Handler)
# The thread of the connection does the handshake, so that an idle client does not stop the others.
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
