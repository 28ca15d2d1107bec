"""Tests of ``certmount demo``: complete runs of the command, and single modules for failures that a run cannot cause."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from csi_driver.authority.ca.certificates import Leaf, sign_leaf
from csi_driver.authority.ca.keyring import Keyring, make_keyring
from csi_driver.cli.demo import steps
from csi_driver.cli.demo.connections import ConnectionLoop, connect, serve
from csi_driver.cli.demo.output import DemoError, Output
from csi_driver.cli.demo.programs import private_directory
from csi_driver.core.certificates.keys import generate_key, load_key
from csi_driver.core.formats.file_format import VolumeContents
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.formats.registry import render_files
from csi_driver.core.names import URI, DNSName, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType, Usage
from tests.support.requirements import missing, require_program

DEMO = (sys.executable, "-m", "csi_driver.cli.main", "demo")
NOBODY = 65534
DEADLINE_S = 60.0
NOW = datetime.now(UTC).replace(microsecond=0)
CART = "spiffe://cluster.local/ns/web/sa/cart"


@dataclass(frozen=True, slots=True)
class DemoRun:
    """Exit status and output of one run of the demo."""

    status: int
    output: str
    errors: str

    @property
    def directory(self) -> Path:
        return demo_directory(self.output)

    @property
    def rotations(self) -> list[tuple[str, str, int, int]]:
        """Serial before and after, and the connections and errors so far, of each rotation."""
        pattern = r"serial (\w+)\.\. -> (\w+)\.\. +(\d+) connections so far, (\d+) errors"
        return [(old, new, int(count), int(errors)) for old, new, count, errors in re.findall(pattern, self.output)]


def run(*options: str, prefix: Sequence[str] = (), cwd: Path | None = None, **environment: str) -> DemoRun:
    command = [*prefix, *DEMO, *options]
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=cwd, env=env)
    return DemoRun(done.returncode, done.stdout, done.stderr)


def demo_directory(output: str) -> Path:
    found = re.search(r"All files are in (\S+)", output)
    assert found, output
    return Path(found[1])


def processes_of(directory: Path) -> dict[int, str]:
    """Return the command lines, by process ID, that contain the demo's directory."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(directory) in command:
                found[int(entry.name)] = command
    return found


def assert_cleaned_up(directory: Path) -> None:
    assert not directory.exists()
    assert not processes_of(directory)


@pytest.fixture(scope="module")
def default_run() -> DemoRun:
    """A run with the default options and with proxies set, as in many companies."""
    proxy = "http://127.0.0.1:9"
    return run(http_proxy=proxy, https_proxy=proxy, grpc_proxy=proxy)


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoRun, Path]:
    """A run that keeps its files in a directory that did not exist."""
    directory = tmp_path_factory.mktemp("kept") / "a directory" / "of mine"
    return run("--rotations", "1", "--keep", str(directory)), directory


def test_demo_succeeds_and_cleans_up(default_run: DemoRun) -> None:
    """The demo exits with status 0 and writes nothing to standard error; no process and no file remains."""
    assert (default_run.status, default_run.errors) == (0, "")
    assert_cleaned_up(default_run.directory)
    assert f"{default_run.directory} is deleted" in default_run.output


@pytest.mark.parametrize(
    "expected",
    [
        r"root\.crt +-r--r--r-- +\d+ bytes",
        r"site\.crt +-r--r--r-- +\d+ bytes",
        r"site\.key +-r--r----- +\d+ bytes",
        r"site\.pem +-r--r----- +\d+ bytes",
        r"DNS names +shop\.web\.svc\.cluster\.local",
        r"SPIFFE ID +spiffe://cluster\.local/ns/web/sa/shop",
        r"issued by +certmount intermediate",
        r"valid +until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, for (1h|59m\d+s)\n",
        r"key type +EC-P256",
        r"SHA-256 +([0-9a-f]{2}:){15}[0-9a-f]{2}\n +([0-9a-f]{2}:){15}[0-9a-f]{2}\n",
        r"server +shop\.web\.svc\.cluster\.local\n +spiffe://cluster\.local/ns/web/sa/shop\n",
        r"client +spiffe://cluster\.local/ns/web/sa/cart\n",
        r"protocol +TLSv1\.3",
        r"pod event: .*NameNotAllowed.*shop\.web\.svc\.cluster\.local",
        r"pod event: .*web/thief.*(?i:ask an administrator)",
    ],
)
def test_output_shows_files_certificate_peers_and_rejection(default_run: DemoRun, expected: str) -> None:
    """The output shows the files with their modes, the certificate, the names of both peers, and the rejected name."""
    assert re.search(expected, default_run.output)


def test_certificate_rotates_twice_without_a_failed_connection(default_run: DemoRun) -> None:
    """The default is two rotations. Each starts with the serial of the one before, and no connection fails."""
    first, second = default_run.rotations
    assert first[0] != first[1] == second[0] != second[1]
    assert 0 < first[2] < second[2]
    assert (first[3], second[3]) == (0, 0)


def test_output_without_terminal_is_plain(default_run: DemoRun) -> None:
    """The output is ASCII without colors, and never contains a key or a token."""
    assert default_run.output.isascii()
    for forbidden in ("\x1b", "PRIVATE KEY", "eyJ"):
        assert forbidden not in default_run.output


def test_keep_copies_the_last_generation(kept_run: tuple[DemoRun, Path]) -> None:
    """A new directory contains only root.crt, site.crt and site.key of one generation; only the owner can read the key."""
    done, directory = kept_run
    assert (done.status, done.errors) == (0, "")
    assert_cleaned_up(done.directory)
    assert {path.name for path in directory.iterdir()} == {"root.crt", "site.crt", "site.key"}
    assert stat.S_IMODE((directory / "site.key").stat().st_mode) == 0o600
    (root,) = decode_certificates((directory / "root.crt").read_bytes())
    leaf, intermediate = decode_certificates((directory / "site.crt").read_bytes())
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(root)
    key = load_key(Secret((directory / "site.key").read_bytes()))
    assert key.public_key() == leaf.public_key()
    ((_, after, _, _),) = done.rotations
    assert f"{leaf.serial_number:040x}".startswith(after)


@pytest.mark.peers("openssl")
def test_printed_openssl_commands_succeed(kept_run: tuple[DemoRun, Path]) -> None:
    """The printed openssl commands work when copied, even if the directory's name contains spaces."""
    lines = [line.strip() for line in kept_run[0].output.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("openssl ")]
    results = [subprocess.run(line, capture_output=True, text=True, check=True).stdout for line in commands]
    verified, described, _ = results
    assert verified.endswith("site.crt: OK\n")
    assert "DNS:shop.web.svc.cluster.local" in described


def test_demo_runs_without_root() -> None:
    """The demo works for an unprivileged user. It replaces existing files, and sets the right modes."""
    prefix = as_unprivileged()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        key = directory / "site.key"
        key.write_text("older")
        key.chmod(0o644)
        if os.geteuid() == 0:
            shutil.chown(directory, NOBODY, NOBODY)
            shutil.chown(key, NOBODY, NOBODY)
        done = run("--rotations", "1", "--keep", name, prefix=prefix, cwd=Path("/"))
        assert (done.status, done.errors) == (0, "")
        assert key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
        found = key.stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_uid == (NOBODY if os.geteuid() == 0 else os.geteuid())
    assert_cleaned_up(done.directory)


@pytest.mark.parametrize("keep, expected", [("file", "is a file"), ("file/below", "Not a directory")])
def test_keep_rejects_a_path_that_is_not_a_directory(tmp_path: Path, keep: str, expected: str) -> None:
    """The command rejects the path before it starts anything, and names the option."""
    (tmp_path / "file").touch()
    done = run("--keep", str(tmp_path / keep))
    assert (done.status, done.output) == (2, "")
    assert "--keep" in done.errors
    assert expected in done.errors


@pytest.mark.parametrize("no_color", ["", "1"])
def test_ctrl_c_on_a_terminal_cleans_up(no_color: str) -> None:
    """An interrupted demo stops its programs, deletes its directory and fails. It uses colors unless NO_COLOR is set."""
    with on_terminal(NO_COLOR=no_color) as (process, read_until):
        output = read_until("1. Start certmount")
        directory = demo_directory(output)
        output += read_until("published after")
        assert len(processes_of(directory)) == 2
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        output += read_until("Stopped.")
        assert process.wait(DEADLINE_S) == 128 + signal.SIGINT
    assert_cleaned_up(directory)
    assert ("\x1b" in output) is (not no_color)


@pytest.mark.parametrize("program", ["authority", "node"])
def test_killed_program_fails_the_demo(program: str) -> None:
    """The demo names the program and shows its last log lines, stops the other program, and deletes its directory."""
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        output = ""
        for line in process.stdout:
            output += line
            if "published after" in line:
                break
        directory = demo_directory(output)
        (victim,) = (pid for pid, line in processes_of(directory).items() if f"csi_driver.cli.main {program} " in line)
        os.kill(victim, signal.SIGKILL)
        process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(DEADLINE_S) == 1
    assert f"The demo failed: certmount {program} was killed by signal 9" in errors
    assert f"Last lines of the log of certmount {program}:\n   {{" in errors
    assert "is deleted" in errors
    assert_cleaned_up(directory)


async def test_failed_connection_fails_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the server presents a certificate of another CA for a while, the demo counts and shows the errors, and fails."""
    own, foreign = make_keyring(NOW), make_keyring(NOW)
    shop, cart = tmp_path / "shop", tmp_path / "cart"
    put_files(shop, own, steps.SHOP_NAME)
    put_files(cart, own)
    async with serve(shop) as port:
        first = await asyncio.to_thread(connect, cart, port, steps.SHOP_NAME)
        loop = ConnectionLoop(cart, port, steps.SHOP_NAME)
        rotating = asyncio.create_task(steps.rotate(Output(), loop, first, 1))
        await until(lambda: loop.connections > 1)
        put_files(shop, foreign, steps.SHOP_NAME)
        await until(lambda: loop.errors > 0)
        put_files(shop, own, steps.SHOP_NAME)
        await asyncio.wait([rotating])
    error = rotating.exception()
    assert isinstance(error, DemoError)
    assert re.fullmatch(r"\d+ of \d+ connections failed; the first error: .*certificate verify failed.*", str(error))
    assert re.search(r"connections so far, [1-9]\d* errors", capsys.readouterr().out)


async def test_server_rejects_a_client_of_another_ca(tmp_path: Path) -> None:
    """TLS is mutual: the server rejects such a client, and still serves others."""
    own, foreign = make_keyring(NOW), make_keyring(NOW)
    shop, cart = tmp_path / "shop", tmp_path / "cart"
    put_files(shop, own, steps.SHOP_NAME)
    put_files(cart, foreign)
    (cart / "root.crt").write_bytes(own.roots_pem)
    async with serve(shop) as port:
        with pytest.raises((OSError, ValueError)):
            await asyncio.to_thread(connect, cart, port, steps.SHOP_NAME)
        put_files(cart, own)
        assert (await asyncio.to_thread(connect, cart, port, steps.SHOP_NAME)).client.uris == [CART]


def test_directory_without_shared_memory_is_temporary(tmp_path: Path) -> None:
    """Without /dev/shm the demo's directory is in the temporary directory, and only its owner can enter it."""
    with private_directory(tmp_path / "missing") as name:
        assert Path(name).parent == Path(tempfile.gettempdir())
        assert stat.S_IMODE(Path(name).stat().st_mode) == 0o700
    assert not Path(name).exists()


def as_unprivileged() -> Sequence[str]:
    """Return a command prefix that drops root; empty if the tests run without root."""
    if os.geteuid() != 0:
        return ()
    plain = (require_program("setpriv"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    # If Python or the sources are in a directory that only root can read, grant the right to read and nothing else.
    reading = (*plain, "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")
    # Root opens the first Python; only its child shows whether the user can run it.
    probe = "import csi_driver.cli.main, subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    for prefix in (plain, reading):
        command = [*prefix, sys.executable, "-c", probe]
        if subprocess.run(command, cwd="/", capture_output=True, check=False).returncode == 0:
            return prefix
    return missing("needs a Python that an unprivileged user can run")


@contextmanager
def on_terminal(**environment: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str], str]]]:
    """Run the demo on a pseudoterminal; yield it and a function that reads its output until a text appears."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(DEMO, stdout=theirs, stderr=theirs, env=os.environ | environment)
        os.close(theirs)
        deadline = time.monotonic() + DEADLINE_S

        def read_until(text: str) -> str:
            output = ""
            while text not in output:
                readable, _, _ = select.select([ours], [], [], deadline - time.monotonic())
                assert readable, output
                output += os.read(ours, 4096).decode()
            return output

        with process:
            yield process, read_until
    finally:
        os.close(ours)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # counters have no event
            await asyncio.sleep(0.01)


def put_files(directory: Path, keyring: Keyring, *dns: str) -> None:
    """Write a new certificate into a directory, each file atomically; without a DNS name it is the one of web/cart."""
    key = generate_key(KeyType.EC_P256)
    names = Names.of([DNSName.parse(name) for name in dns], [] if dns else [URI.parse(CART)])
    leaf = sign_leaf(
        Leaf(key.public_key(), names, timedelta(hours=1), (Usage.SERVER, Usage.CLIENT)), keyring.intermediate, NOW
    )
    directory.mkdir(exist_ok=True)
    for file in render_files(VolumeContents(key, (leaf, keyring.intermediate.certificate), (keyring.root,))):
        temporary = directory / f"{file.name}.new"
        temporary.write_bytes(file.content.reveal())
        temporary.replace(directory / file.name)
