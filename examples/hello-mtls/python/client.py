import ssl
import sys
import time
import urllib.request


def newest():
    """Read the files for each connection."""
    context = ssl.create_default_context(cafile="/var/run/tls/root.crt")
    # load_cert_chain opens a path twice, so pass a descriptor: key and certificate are then of one generation.
    with open("/var/run/tls/site.pem") as file:
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context


while True:
    try:
        with urllib.request.urlopen(sys.argv[1], context=newest(), timeout=10) as response:
            print(response.read().decode(), end="", flush=True)
    except OSError as error:
        print("error:", error, flush=True)
    time.sleep(1)
