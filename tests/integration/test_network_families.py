"""Both programs, their listeners and clients on hosts with IPv4 only, IPv6 only and both, in network namespaces."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_health_server import directory, options
from tests.support.driver import started
from tests.support.requirements import missing, require_program, require_root

pytestmark = pytest.mark.root
__all__ = ["directory"]  # a fixture

ADDRESSES = {"ipv4": ("127.0.0.1",), "ipv6": ("::1",), "dual": ("127.0.0.1", "::1")}
_BOTH = "127.0.0.1 localhost\n::1 localhost\n"
HOSTS = {"ipv4": _BOTH, "ipv6": "::1 localhost\n", "dual": _BOTH}
NO_IPV6 = [f"net.ipv6.conf.{interface}.disable_ipv6=1" for interface in ("all", "default", "lo")]
# Prints the HTTP status of a path, and for gRPC the protocol that the server selects over TLS.
CLIENT = """
import http.client, ssl, socket, sys, time
kind, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
deadline = time.monotonic() + 20
while True:
    try:
        connection = socket.create_connection((host, port), 5)
        break
    except ConnectionRefusedError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.05)  # between attempts to connect
if kind == "tls":
    context = ssl._create_unverified_context()
    context.set_alpn_protocols(["h2"])
    print(context.wrap_socket(connection).selected_alpn_protocol())
else:
    client = http.client.HTTPConnection(host, port)
    client.sock = connection
    client.request("GET", kind)
    print(client.getresponse().status)
"""


class Network:
    """A network namespace with a loopback interface."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.name = f"certmount-{family}-{os.getpid()}"
        self.addresses = ADDRESSES[family]
        self.within = [require_program("ip"), "netns", "exec", self.name]

    def run(self, *command: str, timeout: float = 60) -> str:
        result = subprocess.run([*self.within, *command], capture_output=True, text=True, timeout=timeout, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def started(self, directory: Path, *arguments: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return started(*arguments, log=directory / "log", within=self.within)

    def ask(self, kind: str, host: str, port: int) -> str:
        return self.run(sys.executable, "-c", CLIENT, kind, host, str(port)).strip()


@pytest.fixture(params=ADDRESSES)
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    require_root()
    found = Network(request.param)
    ip = found.within[0]
    if subprocess.run([ip, "netns", "add", found.name], capture_output=True, check=False).returncode:
        missing("needs the permission to create network namespaces")
    hosts = Path("/etc/netns") / found.name / "hosts"  # ip-netns(8) mounts it over /etc/hosts
    try:
        hosts.parent.mkdir(parents=True)
        hosts.write_text(HOSTS[found.family])
        found.run(ip, "link", "set", "lo", "up")
        if found.family == "ipv4":
            found.run("sysctl", "-qw", *NO_IPV6)
        elif found.family == "ipv6":
            found.run(ip, "-4", "address", "flush", "dev", "lo")
        yield found
    finally:
        hosts.unlink(missing_ok=True)
        hosts.parent.rmdir()
        subprocess.run([ip, "netns", "delete", found.name], check=True)


def test_issuing_and_renewal(network: Network) -> None:
    """The demo: node driver, authority, their connections, probes, and mutual TLS between pods, by the name localhost."""
    output = network.run(sys.executable, "-m", "csi_driver.cli.main", "demo", "--rotations=1")
    assert "0 errors" in output
    assert "no volume, record or key remains on the node" in output


def test_listeners_use_each_address_by_default(network: Network, directory: Path) -> None:
    authority = [text for text in options("authority", directory) if not text.startswith("--listen")]
    with network.started(directory, *authority, "--acme-http=:8080"):
        for address in network.addresses:
            assert network.ask("/healthz", address, 9441) == "200"
            assert network.ask("tls", address, 8443) == "h2"
            assert network.ask("/.well-known/acme-challenge/unknown", address, 8080) == "404"
    with network.started(directory, *options("node", directory)):
        for address in network.addresses:
            assert network.ask("/metrics", address, 9440) == "200"


def test_listeners_use_an_explicit_address(network: Network, directory: Path) -> None:
    address = network.addresses[-1]
    host = f"[{address}]" if ":" in address else address
    authority = [text for text in options("authority", directory) if not text.startswith("--listen")]
    listeners = [f"--listen={host}:8443", f"--http={host}:9441", f"--acme-http={host}:8080"]
    with network.started(directory, *authority, *listeners):
        assert network.ask("/healthz", address, 9441) == "200"
        assert network.ask("tls", address, 8443) == "h2"
        assert network.ask("/.well-known/acme-challenge/unknown", address, 8080) == "404"
