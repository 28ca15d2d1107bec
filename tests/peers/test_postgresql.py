"""Programs that check the owner and the mode of a key: PostgreSQL, server and client, and OpenSSH."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.node.world import Node, running_node
from tests.peers.processes import LOOPBACK, running
from tests.peers.readers import serial_in
from tests.support.ports import free_port
from tests.support.requirements import missing, require_program, require_root
from tests.support.waiting import until

pytestmark = pytest.mark.root

USER, GROUP = 65534, 4711  # PostgreSQL does not start as root
NAME = "db.web.svc.cluster.local"
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups"]


class Server:
    """A PostgreSQL server that accepts only clients with a certificate."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self.programs, self.directory = programs, directory
        self.data, self.log = directory / "data", directory / "log"
        self.port = free_port()

    def create(self) -> None:
        os.chown(self.directory, USER, GROUP)
        options = ["--no-sync", "--username=app", "--auth=trust", str(self.data)]
        initialize = [*AS_USER, str(self.programs / "initdb"), *options]
        subprocess.run(initialize, check=True, capture_output=True, cwd="/")
        (self.data / "pg_hba.conf").write_text("hostssl all all all trust clientcert=verify-ca\n")

    def command(self, files: Path) -> list[str]:
        settings = {
            "ssl": "on", "ssl_ca_file": files / "root.crt", "ssl_cert_file": files / "server.crt",
            "ssl_key_file": files / "server.key", "listen_addresses": LOOPBACK, "port": self.port,
            "unix_socket_directories": self.directory,
        }  # fmt: skip
        options = [text for name, value in settings.items() for text in ("-c", f"{name}={value}")]
        return [*AS_USER, str(self.programs / "postgres"), "-D", str(self.data), *options]

    @contextlib.asynccontextmanager
    async def running(self, files: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
        async with running(self.command(files), self.log, self.port) as process:
            await until(lambda: "ready to accept connections" in self.log.read_text(), "the start of the server")
            yield process

    async def ask(self, files: Path, query: str, host: str = NAME) -> subprocess.CompletedProcess[str]:
        connection = f"host={host} hostaddr={LOOPBACK} port={self.port} user=app dbname=postgres sslmode=verify-full"
        connection += f" sslrootcert={files}/root.crt sslcert={files}/server.crt sslkey={files}/server.key"
        options = ["--no-psqlrc", "--tuples-only", "--no-align", connection, "-c", query]
        return await run([*AS_USER, str(self.programs / "psql"), *options])


async def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run
    return await asyncio.to_thread(done, command, check=False, capture_output=True, text=True, cwd="/", timeout=30)


@pytest.fixture
def server() -> Iterator[Server]:
    require_root()
    require_program("setpriv")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        missing("needs Debian's package postgresql")
    # Not in tmp_path, which only root can enter.
    with tempfile.TemporaryDirectory(prefix="certmount-postgresql-") as directory:
        created = Server(found[-1].parent, Path(directory))
        created.create()
        yield created


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with running_node() as running_driver:
        running_driver.directory.chmod(0o755)
        yield running_driver


@pytest.mark.parametrize(
    "access",
    [
        {"gid": str(GROUP)},
        {"gid": str(GROUP), "key-mode": "0640"},
        {"uid": str(USER)},
        {"uid": str(USER), "gid": str(GROUP), "key-mode": "0600"},
    ],
)
async def test_server_and_client_accept_the_key(server: Server, node: Node, access: dict[str, str]) -> None:
    """The server reads a renewed certificate after a reload."""
    request = await node.published(attributes={"name": NAME, "files": "postgres", **access})
    files = node.target(request)
    async with server.running(files) as process:
        answer = await server.ask(files, "SELECT ssl, client_serial FROM pg_stat_ssl WHERE ssl")
        expected = f"t|{int(serial_in(files), 16)}"
        assert (answer.returncode, answer.stdout.strip()) == (0, expected), answer.stderr
        other = await server.ask(files, "SELECT 1", "other.test")
        assert 'server certificate for "' in other.stderr
        process.send_signal(1)
        await until(lambda: "reloading configuration files" in server.log.read_text(), "the server to reload")
        assert (await server.ask(files, "SELECT 1")).stdout == "1\n"


async def test_server_and_client_reject_a_key_without_a_group(server: Server, node: Node) -> None:
    """Every user can read it: docs/formats.md has the message and the fix."""
    names = {"certificate-file": "server.crt", "key-file": "server.key"}
    with_group = await node.published(attributes={"name": NAME, "files": "postgres", "gid": str(GROUP)})
    without = await node.published(attributes={"name": NAME, **names})
    problem = f'private key file "{node.target(without, "server.key")}" has group or world access'
    result = await run(server.command(node.target(without)))
    assert result.returncode != 0
    assert problem in result.stderr
    async with server.running(node.target(with_group)):
        assert problem in (await server.ask(node.target(without), "SELECT 1")).stderr


async def test_openssh_accepts_only_a_key_of_the_user(node: Node) -> None:
    """OpenSSH rejects a key of the user that others can read, also if they are a group."""
    require_root()
    program = [*AS_USER, require_program("ssh-keygen"), "-y", "-f"]
    uid = {"uid": str(USER)}
    for attributes in (uid, {**uid, "gid": str(GROUP), "key-mode": "0600"}):
        request = await node.published(attributes={"name": NAME, **attributes})
        accepted = await run([*program, str(node.target(request, "site.key"))])
        assert accepted.stdout.startswith("ecdsa-sha2-nistp256 "), accepted.stderr
    request = await node.published(attributes={"name": NAME, **uid, "gid": str(GROUP)})
    rejected = await run([*program, str(node.target(request, "site.key"))])
    assert "Permissions 0440 for" in rejected.stderr
