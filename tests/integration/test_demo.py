"""Tests of ``certmount demo``: complete runs of the command, and single modules for failures that a run cannot cause."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from csi_driver.authority.ca.certificates import Leaf, sign_leaf
from csi_driver.authority.ca.keyring import Keyring, make_keyring
from csi_driver.cli.demo import steps
from csi_driver.cli.demo.connections import ConnectionLoop, connect, serve
from csi_driver.cli.demo.output import DemoError, Output
from csi_driver.cli.demo.programs import private_directory
from csi_driver.core.certificates.keys import generate_key, load_key
from csi_driver.core.formats.file_format import VolumeContents
from csi_driver.core.formats.layout import FileLayout
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.names import URI, DNSName, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType, Usage
from tests.support.requirements import missing, require_program
from tests.support.waiting import until

DEMO = (sys.executable, "-m", "csi_driver.cli.main", "demo")
NOBODY = 65534
DEADLINE_S = 60.0
NOW = datetime.now(UTC).replace(microsecond=0)
CART = "spiffe://cluster.local/ns/web/sa/cart"
OWN, FOREIGN = make_keyring(NOW), make_keyring(NOW)


def run(*options: str, prefix: Sequence[str] = (), cwd: Path | None = None, **env: str) -> CompletedProcess[str]:
    command, env = [*prefix, *DEMO, *options], os.environ | env
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=cwd, env=env)


def rotations_in(output: str) -> list[tuple[str, str, int, int]]:
    """Return the serial before and after, and the connections and errors so far, of each rotation."""
    pattern = r"serial (\w+)\.\. -> (\w+)\.\. +(\d+) connections so far, (\d+) errors"
    return [(old, new, int(count), int(errors)) for old, new, count, errors in re.findall(pattern, output)]


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
def default_run() -> CompletedProcess[str]:
    """A run with the default options and with proxies set, as in many companies."""
    proxy = "http://127.0.0.1:9"
    return run(http_proxy=proxy, https_proxy=proxy, grpc_proxy=proxy)


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletedProcess[str], Path]:
    """A run that keeps its files in a directory that did not exist."""
    directory = tmp_path_factory.mktemp("kept") / "a directory" / "of mine"
    return run("--rotations", "1", "--keep", str(directory)), directory


def test_demo_succeeds_and_cleans_up(default_run: CompletedProcess[str]) -> None:
    assert (default_run.returncode, default_run.stderr) == (0, "")
    directory = demo_directory(default_run.stdout)
    assert_cleaned_up(directory)
    assert f"{directory} is deleted" in default_run.stdout


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
def test_output_shows_files_certificate_peers_and_rejection(default_run: CompletedProcess[str], expected: str) -> None:
    assert re.search(expected, default_run.stdout)


def test_certificate_rotates_twice_without_a_failed_connection(default_run: CompletedProcess[str]) -> None:
    first, second = rotations_in(default_run.stdout)
    assert first[0] != first[1] == second[0] != second[1]
    assert 0 < first[2] < second[2]
    assert (first[3], second[3]) == (0, 0)


def test_output_without_terminal_is_plain(default_run: CompletedProcess[str]) -> None:
    assert default_run.stdout.isascii()
    assert not re.search("\x1b|PRIVATE KEY|eyJ", default_run.stdout)


def test_keep_copies_the_last_generation(kept_run: tuple[CompletedProcess[str], Path]) -> None:
    done, directory = kept_run
    assert (done.returncode, done.stderr) == (0, "")
    assert_cleaned_up(demo_directory(done.stdout))
    assert {path.name for path in directory.iterdir()} == {"root.crt", "site.crt", "site.key"}
    assert stat.S_IMODE((directory / "site.key").stat().st_mode) == 0o600
    (root,) = decode_certificates((directory / "root.crt").read_bytes())
    leaf, intermediate = decode_certificates((directory / "site.crt").read_bytes())
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(root)
    assert load_key(Secret((directory / "site.key").read_bytes())).public_key() == leaf.public_key()
    ((_, after, _, _),) = rotations_in(done.stdout)
    assert f"{leaf.serial_number:x}".startswith(after)


@pytest.mark.peers("openssl")
def test_printed_openssl_commands_succeed(kept_run: tuple[CompletedProcess[str], Path]) -> None:
    lines = [line.strip() for line in kept_run[0].stdout.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("openssl ")]
    verified, shown, _ = (subprocess.run(one, capture_output=True, text=True, check=True).stdout for one in commands)
    assert verified.endswith("site.crt: OK\n")
    assert "DNS:shop.web.svc.cluster.local" in shown


def test_demo_runs_without_root() -> None:
    prefix = as_unprivileged()
    with tempfile.TemporaryDirectory() as name:
        directory, key = Path(name), Path(name, "site.key")
        key.write_text("older")
        key.chmod(0o644)
        if os.geteuid() == 0:
            for path in (directory, key):
                shutil.chown(path, NOBODY, NOBODY)
        done = run("--rotations", "1", "--keep", name, prefix=prefix, cwd=Path("/"))
        assert (done.returncode, done.stderr) == (0, "")
        assert key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert key.stat().st_uid == (NOBODY if os.geteuid() == 0 else os.geteuid())
    assert_cleaned_up(demo_directory(done.stdout))


@pytest.mark.parametrize("keep, expected", [("file", "is a file"), ("file/below", "Not a directory")])
def test_keep_rejects_a_path_that_is_not_a_directory(tmp_path: Path, keep: str, expected: str) -> None:
    (tmp_path / "file").touch()
    done = run("--keep", str(tmp_path / keep))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--keep" in done.stderr
    assert expected in done.stderr


@pytest.mark.parametrize("no_color", ["", "1"])
def test_ctrl_c_on_a_terminal_cleans_up(no_color: str) -> None:
    ours, theirs = pty.openpty()
    output = ""

    def read_until(text: str) -> None:
        nonlocal output
        while text not in output:
            output += os.read(ours, 4096).decode()  # raises OSError when the demo has ended

    with subprocess.Popen(DEMO, stdout=theirs, stderr=theirs, env=os.environ | {"NO_COLOR": no_color}) as process:
        os.close(theirs)
        read_until("published after")
        directory = demo_directory(output)
        assert len(processes_of(directory)) == 2
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        read_until("Stopped.")
        assert process.wait(DEADLINE_S) == 128 + signal.SIGINT
    os.close(ours)
    assert_cleaned_up(directory)
    assert ("\x1b" in output) is (not no_color)


@pytest.mark.parametrize("program", ["authority", "node"])
def test_killed_program_fails_the_demo(program: str) -> None:
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = iter(process.stdout.readline, "")
        directory = demo_directory("".join(takewhile(lambda line: "published after" not in line, lines)))
        (victim,) = (pid for pid, line in processes_of(directory).items() if f"csi_driver.cli.main {program} " in line)
        os.kill(victim, signal.SIGKILL)
        process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(DEADLINE_S) == 1
    assert f"The demo failed: certmount {program} was killed by signal 9" in errors
    assert f"Last lines of the log of certmount {program}:\n   {{" in errors
    assert "is deleted" in errors
    assert_cleaned_up(directory)


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    put_files(tmp_path / "shop", OWN, steps.SHOP_NAME)
    put_files(tmp_path / "cart", OWN)
    return tmp_path / "shop", tmp_path / "cart"


async def test_failed_connection_fails_the_demo(
    directories: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shop, cart = directories
    async with serve(shop) as port:
        first = await asyncio.to_thread(connect, cart, port, steps.SHOP_NAME)
        loop = ConnectionLoop(cart, port, steps.SHOP_NAME)
        rotating = asyncio.create_task(steps.rotate(Output(), loop, first, 1))
        await until(lambda: loop.connections > 1, "connections")
        put_files(shop, FOREIGN, steps.SHOP_NAME)
        await until(lambda: loop.errors > 0, "an error")
        put_files(shop, OWN, steps.SHOP_NAME)
        await asyncio.wait([rotating])
    error = rotating.exception()
    assert isinstance(error, DemoError)
    assert re.fullmatch(r"\d+ of \d+ connections failed; the first error: .*certificate verify failed.*", str(error))
    assert re.search(r"connections so far, [1-9]\d* errors", capsys.readouterr().out)


async def test_server_rejects_a_client_of_another_ca(directories: tuple[Path, Path]) -> None:
    shop, cart = directories
    put_files(cart, FOREIGN)
    (cart / "root.crt").write_bytes(OWN.roots_pem)
    async with serve(shop) as port:
        with pytest.raises((OSError, ValueError)):
            await asyncio.to_thread(connect, cart, port, steps.SHOP_NAME)
        put_files(cart, OWN)
        assert (await asyncio.to_thread(connect, cart, port, steps.SHOP_NAME)).client.uris == [CART]


def test_directory_without_shared_memory_is_temporary(tmp_path: Path) -> None:
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


def put_files(directory: Path, keyring: Keyring, *dns: str) -> None:
    """Write a new certificate into a directory, each file atomically; without a DNS name it is the one of web/cart."""
    key = generate_key(KeyType.EC_P256)
    names = Names.of([DNSName.parse(name) for name in dns], [] if dns else [URI.parse(CART)])
    content = Leaf(key.public_key(), names, timedelta(hours=1), (Usage.SERVER, Usage.CLIENT))
    leaf = sign_leaf(content, keyring.intermediate, NOW)
    directory.mkdir(exist_ok=True)
    for file in FileLayout().render(VolumeContents(key, (leaf, keyring.intermediate.certificate), (keyring.root,))):
        temporary = directory / f"{file.name}.new"
        temporary.write_bytes(file.content.reveal())
        temporary.replace(directory / file.name)
