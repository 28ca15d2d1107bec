"""docs/recipes.md: each configuration runs in the real program, while its files are replaced under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from csi_driver.core.names import DNSName, Names
from csi_driver.core.reload import Reload
from csi_driver.node.renewal.reloads import SIGNAL_DELAY_S
from tests.peers.processes import LOOPBACK, running
from tests.peers.recipes import (
    HELLO,
    MOUNT,
    PAGE,
    POSTGRESQL,
    REDIS,
    Load,
    Peer,
    Recipe,
    Volume,
    client_context,
    rotate_under_load,
    start_postgresql,
)
from tests.support.documentation import documented
from tests.support.hello_mtls import EXAMPLES, build_rust, rust_cache
from tests.support.ports import free_port
from tests.support.requirements import missing, require_program, require_root
from tests.support.scripted_authority import TestCA
from tests.support.waiting import until

CA = TestCA()
USER, GROUP = 65534, 4711  # PostgreSQL does not start as root
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups"]


class World:
    """The volume of a recipe, and what its server needs."""

    def __init__(self, directory: Path, title: str, **changes: str) -> None:
        self.directory, self.port = directory, free_port()
        self.recipe = Recipe.read(title, **changes)
        self.volume = Volume(directory, self.recipe.spec, CA)
        self.log = directory / "log"

    def write(self, language: str, name: str, replacements: dict[str, str]) -> Path:
        """Write a block of the recipe to a file, with the paths and ports of this machine."""
        file = self.directory / name
        file.write_text(self.recipe.text(language, {MOUNT: str(self.volume.directory), **replacements}))
        return file

    def load(self, **options: object) -> Load:
        return Load(self.volume, CA, Peer(self.port, **options))  # type: ignore[arg-type]

    def signal(self, process: subprocess.Popen[bytes]) -> Callable[[], Awaitable[None]]:
        """Return a function that sends the signal of the recipe as the driver does."""
        reload = self.recipe.spec.reload
        assert isinstance(reload, Reload)
        assert Path(f"/proc/{process.pid}/comm").read_text().strip() == reload.process

        async def send() -> None:
            await asyncio.sleep(SIGNAL_DELAY_S)
            process.send_signal(signal.Signals[f"SIG{reload.signal.value}"])

        return send


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not tmp_path, which only root can enter."""
    require_root()  # the key belongs to the group of the program
    with tempfile.TemporaryDirectory(prefix="certmount-recipe-") as path:
        Path(path).chmod(0o755)
        yield Path(path)


def _nginx(world: World) -> list[str]:
    directory = world.directory
    paths = "".join(
        f"{kind}_temp_path {directory}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = world.write(
        "nginx", "nginx.conf", {"8443": f"{LOOPBACK}:{world.port}", "http {": f"http {{ access_log off; {paths}"}
    )
    return [require_program("nginx"), "-c", str(file), "-g", f"error_log stderr; pid {directory}/pid; daemon off;"]


def _go(world: World) -> list[str]:
    file = world.write("go", "main.go", {":8443": f"{LOOPBACK}:{world.port}"})
    environment = {**os.environ, "CGO_ENABLED": "0", "GO111MODULE": "off"}
    program = str(world.directory / "server")
    command = [require_program("go"), "build", "-o", program, str(file)]
    subprocess.run(command, check=True, cwd=world.directory, env=environment)
    return [program]


def _rust(world: World) -> list[str]:
    crate = world.directory / "crate"
    with rust_cache("recipe-rust") as target:
        shutil.copytree(EXAMPLES / "rust", crate)
        (crate / "src/lib.rs").write_text(world.recipe.text("rust", {MOUNT: str(world.volume.directory)}))
        server = world.recipe.text("rust 2", {"0.0.0.0:8443": f"{LOOPBACK}:{world.port}"})
        (crate / "src/bin/server.rs").write_text(server)
        build_rust(crate, target, world.directory)
    return [str(world.directory / "server")]


def _script(program: str, language: str, name: str) -> Callable[[World], list[str]]:
    return lambda world: [require_program(program), str(world.write(language, name, {"8443": str(world.port)}))]


MUTUAL_TLS = {
    "nginx": _nginx,
    "Go": _go,
    "Python": _script("python3", "python", "server.py"),
    "Node.js": _script("node", "js", "server.js"),
    "Java": _script("java", "java", "Server.java"),
    "Rust": _rust,
}
"""The commands of the servers that require a certificate from their clients."""
PROGRAMS = [title for title in MUTUAL_TLS if title != "nginx"]
NGINX_HELLO = (HELLO[0], b"hello certificate ")
first_build = pytest.mark.timeout(900)  # of Rust


@contextlib.asynccontextmanager
async def serving(
    directory: Path, title: str
) -> AsyncIterator[tuple[World, Peer, Callable[[], Awaitable[None]] | None]]:
    """Run a server with mutual TLS. The last value does what the recipe requires after the files were replaced."""
    world = World(directory, title)
    async with running(MUTUAL_TLS[title](world), world.log, world.port) as process:
        peer = Peer(world.port, exchange=NGINX_HELLO if title == "nginx" else HELLO)
        yield world, peer, world.signal(process) if world.recipe.spec.reload else None


@first_build
@pytest.mark.parametrize("title", MUTUAL_TLS)
async def test_server_with_mutual_tls(directory: Path, title: str) -> None:
    async with serving(directory, title) as (world, peer, reload):
        await rotate_under_load(Load(world.volume, CA, peer), reload)


REJECTED = (OSError, AssertionError)


@first_build
@pytest.mark.parametrize("title", MUTUAL_TLS)
async def test_idle_connections_do_not_stop_a_server(directory: Path, title: str) -> None:
    async with serving(directory, title) as (world, peer, _):
        with contextlib.ExitStack() as idle:
            for _number in range(32):
                idle.enter_context(socket.create_connection((LOOPBACK, world.port)))
            peer.connect(client_context(CA))


@first_build
@pytest.mark.parametrize("title", MUTUAL_TLS)
async def test_resumed_session_is_rejected_after_its_root_was_removed(directory: Path, title: str) -> None:
    other = TestCA("other root")
    async with serving(directory, title) as (world, peer, reload):
        sessions = _sessions(peer, timedelta(hours=1), other)
        serial = world.volume.replace(other)
        if reload is not None:
            await reload()
        trusted = client_context(other)
        # A former worker of nginx can accept some more connections.
        await until(lambda: all(_serves(peer, trusted, serial) for _ in range(10)), "the new certificate")
        _assert_rejected(peer, sessions)


@first_build
@pytest.mark.parametrize("title", MUTUAL_TLS)
async def test_resumed_session_is_rejected_after_its_certificate_expired(directory: Path, title: str) -> None:
    async with serving(directory, title) as (_, peer, _):
        lifetime = timedelta(seconds=3)
        sessions = _sessions(peer, lifetime)
        expired = datetime.now(UTC) + lifetime + timedelta(seconds=1)  # the last second is valid
        await until(lambda: datetime.now(UTC) > expired, "the end of the lifetime")
        _assert_rejected(peer, sessions)
        peer.connect(client_context(CA))


def _sessions(peer: Peer, lifetime: timedelta, *roots: TestCA) -> list[tuple[ssl.SSLContext, ssl.SSLSession | None]]:
    """Connect with each version of TLS that the server supports. Return the clients with their sessions."""
    sessions = []
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = client_context(CA, *roots, lifetime=lifetime)
        context.maximum_version = version
        with contextlib.suppress(ssl.SSLError):
            sessions.append((context, peer.connect(context)[1]))
    assert sessions
    return sessions


def _assert_rejected(peer: Peer, sessions: list[tuple[ssl.SSLContext, ssl.SSLSession | None]]) -> None:
    for context, session in sessions:
        with pytest.raises(REJECTED):
            peer.connect(context, session)


def _serves(peer: Peer, context: ssl.SSLContext, serial: int) -> bool:
    with contextlib.suppress(*REJECTED):
        return peer.connect(context)[0] == serial
    return False


@first_build
@pytest.mark.parametrize("title", PROGRAMS)
async def test_client_without_spiffe_id_gets_an_error_and_the_server_continues(directory: Path, title: str) -> None:
    async with serving(directory, title) as (_, peer, _):
        with pytest.raises(REJECTED) as error:
            peer.connect(client_context(CA, names=Names.of([DNSName.parse("client.web.svc")])))
        assert " 200 " not in str(error.value)
        peer.connect(client_context(CA))


async def test_container_of_nginx_ends_with_nginx(directory: Path) -> None:
    """Kubernetes then restarts it."""
    world = World(directory, "nginx")
    program, *arguments = _nginx(world)
    script = (EXAMPLES / "nginx/server.sh").read_text()
    for old, new in {
        "nginx -c /app/nginx.conf -g 'daemon off;'": shlex.join([program, *arguments]),
        MOUNT: str(world.volume.directory),
    }.items():
        assert old in script
        script = script.replace(old, new)
    async with running(["sh", "-c", script], world.log, world.port) as process:
        os.kill(int((directory / "pid").read_text()), signal.SIGTERM)
        await until(lambda: process.poll() is not None, "the end of the container", 10)
    assert process.returncode == 1


async def test_haproxy(directory: Path) -> None:
    world = World(directory, "HAProxy")
    replacements = {":8443": f"{LOOPBACK}:{world.port}", "/var/run/haproxy.sock": str(directory / "socket")}
    file = world.write("haproxy", "haproxy.cfg", replacements)
    async with running([require_program("haproxy"), "-W", "-f", str(file)], world.log, world.port) as process:
        await rotate_under_load(world.load(), world.signal(process))


def _postgresql(directory: Path) -> tuple[Path, Path]:
    """Create a database; return the directories of PostgreSQL's programs and of the database."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        missing("needs Debian's package postgresql")
    os.chown(directory, USER, GROUP)
    options = ["--no-sync", "--username=app", "--auth=trust", str(directory / "data")]
    subprocess.run([*AS_USER, str(programs[-1] / "initdb"), *options], check=True, capture_output=True, cwd="/")
    return programs[-1], directory / "data"


@pytest.mark.root
async def test_postgresql(directory: Path) -> None:
    require_root()
    require_program("setpriv")
    world = World(directory, "PostgreSQL", fs_group=str(GROUP))
    programs, data = _postgresql(directory)
    settings = world.write("ini", "recipe.conf", {}).read_text()
    settings += f"listen_addresses = '{LOOPBACK}'\nport = {world.port}\nunix_socket_directories = '{directory}'\n"
    (data / "postgresql.conf").write_text(settings)
    (data / "pg_hba.conf").write_text("hostssl all all all trust\n")
    command = [*AS_USER, str(programs / "postgres"), "-D", str(data)]
    async with running(command, world.log, world.port) as process:
        await until(lambda: "ready to accept connections" in world.log.read_text(), "the start of the server")
        load = world.load(name="db.web.svc", exchange=POSTGRESQL, start=start_postgresql)
        await rotate_under_load(load, world.signal(process))


async def test_redis(directory: Path) -> None:
    world = World(directory, "Redis")
    file = world.write("conf", "redis.conf", {"tls-port 6379": f"tls-port {world.port}"})
    file.write_text(f"{file.read_text()}bind {LOOPBACK}\ndir {directory}\n")
    script = world.write("sh", "watch", {"-p 6379": f"-p {world.port}"})
    require_program("redis-cli")
    async with running([require_program("redis-server"), str(file)], world.log, world.port):
        watcher = await asyncio.create_subprocess_exec("sh", str(script), stdout=subprocess.DEVNULL)
        try:
            await rotate_under_load(world.load(name="cache.web.svc", exchange=REDIS))
        finally:
            watcher.kill()
            await watcher.wait()


async def test_etcd(directory: Path) -> None:
    require_program("etcd")
    world = World(directory, "etcd")
    peer = f"http://{LOOPBACK}:{free_port()}"
    own = f"exec etcd --data-dir {directory}/data --listen-peer-urls {peer} --initial-advertise-peer-urls {peer}"
    own += f" --initial-cluster default={peer}"
    file = world.write("sh", "etcd", {"exec etcd": own, "https://0.0.0.0:2379": f"https://{LOOPBACK}:{world.port}"})
    async with running(["sh", str(file)], world.log, world.port):
        exchange = (b"GET /version HTTP/1.0\r\nHost: etcd.web.svc\r\n\r\n", b"etcdserver")
        load = world.load(name="etcd.web.svc", exchange=exchange)
        await rotate_under_load(load, mixed_error="TLSV1_ALERT_INTERNAL_ERROR")


async def test_envoy(directory: Path) -> None:
    world = World(directory, "Envoy")
    secret = world.write("yaml 2", "sds.yaml", {})
    listener = {
        "/etc/envoy/sds.yaml": str(secret),
        "address: 0.0.0.0, port_value: 8443": f"address: {LOOPBACK}, port_value: {world.port}",
    }
    file = directory / "envoy.yaml"
    file.write_text(world.recipe.text("yaml 3", listener))
    command = [require_program("envoy"), "-c", str(file), "--concurrency", "1", "--disable-hot-restart"]
    async with running(command, world.log, world.port):
        exchange = (b"GET / HTTP/1.1\r\nHost: shop.web.svc\r\nConnection: close\r\n\r\n", b"ok\n")
        await rotate_under_load(world.load(exchange=exchange))


async def test_documented_openssl_command_reaches_the_server(directory: Path) -> None:
    """The command of docs/troubleshooting.md, with the address of the server and the files of this test."""
    command = documented("docs/troubleshooting.md", "openssl s_client")
    async with serving(directory, "Python") as (world, _, _):
        client = Volume(directory / "client", world.recipe.spec, CA)
        for old, new in {"shop.web.svc:8443": f"{LOOPBACK}:{world.port}", MOUNT: str(client.directory)}.items():
            assert old in command
            command = command.replace(old, new)
        process = await asyncio.create_subprocess_shell(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert b"Verify return code: 0 (ok)" in output


@pytest.mark.parametrize(
    "title, language, file",
    [
        ("nginx", "nginx", "nginx/nginx.conf"),
        ("Go", "go", "go/server/main.go"),
        ("Python", "python", "python/server.py"),
        ("Node.js", "js", "node/server.js"),
        ("Java", "java", "java/Server.java"),
        ("Rust", "rust", "rust/src/lib.rs"),
        ("Rust", "rust 2", "rust/src/bin/server.rs"),
    ],
)
def test_recipe_is_the_server_of_the_example(title: str, language: str, file: str) -> None:
    assert Recipe.read(title).blocks[language] == (EXAMPLES / file).read_text(encoding="utf-8")


def test_each_recipe_has_a_test_or_says_that_it_has_none() -> None:
    tested = {"nginx", "HAProxy", "PostgreSQL", "Redis", "etcd", "Envoy", "Go", "Python", "Node.js", "Java", "Rust"}
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))
    without = {title for title, text in sections.items() if "No test runs this recipe." in text}
    assert sections.keys() - without == {*tested, "Without reload signals"}


def test_watcher_for_signals_is_that_of_redis_with_another_command() -> None:
    """The one of Redis runs above. This one would signal each nginx of the machine."""
    redis, nginx = (PAGE.read_text().split(f"## {title}\n", 1)[1] for title in ("Redis", "Without reload signals"))
    scripts = [text.split("```sh\n", 1)[1].split("\n```", 1)[0] for text in (redis, nginx)]
    command = re.compile(r"^    \S.*? &&\s+(?=loaded=)", flags=re.MULTILINE | re.DOTALL)
    assert command.sub("    ", scripts[0]) == command.sub("    ", scripts[1])
