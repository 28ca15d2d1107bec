"""``certmount demo`` as a user runs it, and its own parts where a user cannot bring about what is promised."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from csi_driver.authority.ca.keyring import Keyring, make_keyring
from csi_driver.authority.ca.leaf import Leaf, sign_leaf
from csi_driver.cli.demo import acts
from csi_driver.cli.demo.connections import ConnectionLoop, meet, serving
from csi_driver.cli.demo.failure import DemoFailed
from csi_driver.cli.demo.page import Page
from csi_driver.cli.demo.programs import private_folder
from csi_driver.core.certificates.keys import generate_key, load_key
from csi_driver.core.formats.pem import decode_certificates, render_files
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
class Told:
    """What a run of the demo came to."""

    status: int
    output: str
    errors: str

    @property
    def folder(self) -> Path:
        """Where it happened."""
        return folder_in(self.output)

    @property
    def rotations(self) -> list[tuple[str, str, int, int]]:
        """Serial before and after, connections and errors so far, of each rotation shown."""
        pattern = r"serial (\w+)\.\. -> (\w+)\.\. +(\d+) connections so far, (\d+) errors"
        return [(old, new, int(count), int(errors)) for old, new, count, errors in re.findall(pattern, self.output)]


def run(*options: str, prefix: Sequence[str] = (), cwd: Path | None = None, **environment: str) -> Told:
    done = subprocess.run(
        [*prefix, *DEMO, *options],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
    )
    return Told(done.returncode, done.stdout, done.stderr)


def folder_in(output: str) -> Path:
    found = re.search(r"Everything lies in (\S+)", output)
    assert found, output
    return Path(found[1])


def processes_of(folder: Path) -> dict[int, str]:
    """The processes that have the demo's folder in their command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if entry.name.isdigit() and str(folder) in command:
            found[int(entry.name)] = command
    return found


def assert_tidy(folder: Path) -> None:
    assert not folder.exists()
    assert not processes_of(folder)


@pytest.fixture(scope="module")
def told() -> Told:
    """A run as many people start it: where proxies are set."""
    proxy = "http://127.0.0.1:9"
    return run(http_proxy=proxy, https_proxy=proxy, grpc_proxy=proxy)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, Path]:
    """A run that leaves its files in a folder that was not there."""
    folder = tmp_path_factory.mktemp("kept") / "a folder" / "of mine"
    return run("--rotations", "1", "--keep", str(folder)), folder


def test_the_demo_succeeds_and_leaves_nothing_behind(told: Told) -> None:
    """It ends with status 0 and without a word on standard error; no process and no file of it is left."""
    assert (told.status, told.errors) == (0, "")
    assert_tidy(told.folder)
    assert f"{told.folder} is removed" in told.output


def test_the_demo_shows_the_files_and_the_certificate(told: Told) -> None:
    """The files with their modes, and the fields that people look for."""
    for expected in (
        r"root\.crt +-r--r--r-- +\d+ bytes",
        r"site\.crt +-r--r--r-- +\d+ bytes",
        r"site\.key +-r--r----- +\d+ bytes",
        r"site\.pem +-r--r----- +\d+ bytes",
        r"DNS names +shop\.web\.svc\.cluster\.local",
        r"SPIFFE ID +spiffe://cluster\.local/ns/web/sa/shop",
        r"issued by +certmount intermediate",
        r"valid +until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, (1 hour|59 minutes \d+ seconds?) from now",
        r"key +EC-P256",
        r"SHA-256 +([0-9a-f]{2}:){15}[0-9a-f]{2}\n +([0-9a-f]{2}:){15}[0-9a-f]{2}\n",
    ):
        assert re.search(expected, told.output), expected


def test_the_demo_says_whom_each_side_of_a_connection_met(told: Told) -> None:
    """The server proved its name, the client its service account."""
    assert re.search(
        r"server proved +shop\.web\.svc\.cluster\.local\n +spiffe://cluster\.local/ns/web/sa/shop\n", told.output
    )
    assert re.search(r"client proved +spiffe://cluster\.local/ns/web/sa/cart\n", told.output)
    assert "TLSv1.3" in told.output


def test_the_certificate_rotates_twice_without_one_failed_connection(told: Told) -> None:
    """Two rotations by default, each from the serial that the one before ended with, connections all along, no error."""
    first, second = told.rotations
    assert first[0] != first[1] == second[0] != second[1]
    assert 0 < first[2] < second[2]
    assert (first[3], second[3]) == (0, 0)


def test_a_name_that_policy_does_not_allow_is_refused_in_one_line(told: Told) -> None:
    """The refusal has its reason, the name, the service account, and what to do."""
    line = next(line for line in told.output.splitlines() if "its event says:" in line)
    for expected in ("NameNotAllowed", "shop.web.svc.cluster.local", "web/thief", "ask an administrator"):
        assert expected in line


def test_the_output_is_plain_where_there_is_no_terminal(told: Told) -> None:
    """ASCII without colours; and never a key or a token."""
    assert told.output.isascii()
    for forbidden in ("\x1b", "PRIVATE KEY", "eyJ"):
        assert forbidden not in told.output


def test_keep_leaves_the_last_files_and_only_them(kept: tuple[Told, Path]) -> None:
    """A folder that was not there holds root.crt, site.crt and site.key of one generation, the key for its owner alone."""
    told, folder = kept
    assert (told.status, told.errors) == (0, "")
    assert_tidy(told.folder)
    assert {path.name for path in folder.iterdir()} == {"root.crt", "site.crt", "site.key"}
    assert stat.S_IMODE((folder / "site.key").stat().st_mode) == 0o600
    (root,) = decode_certificates((folder / "root.crt").read_bytes())
    leaf, intermediate = decode_certificates((folder / "site.crt").read_bytes())
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(root)
    key = load_key(Secret((folder / "site.key").read_bytes()))
    assert key.public_key() == leaf.public_key()
    ((_, after, _, _),) = told.rotations
    assert f"{leaf.serial_number:040x}".startswith(after)


@pytest.mark.peers("openssl")
def test_the_printed_commands_work_as_they_are(kept: tuple[Told, Path]) -> None:
    """Whoever copies the openssl commands from the screen sees them succeed, whatever the folder's name."""
    told, _ = kept
    commands = [line.strip() for line in told.output.splitlines() if line.strip().startswith("openssl ")]
    answers = [
        subprocess.run(shlex.split(line), capture_output=True, text=True, check=True).stdout for line in commands
    ]
    verified, described, _ = answers
    assert verified.endswith("site.crt: OK\n")
    assert "DNS:shop.web.svc.cluster.local" in described


def test_no_root_is_needed() -> None:
    """The user nobody sees the same, and what was in the folder before gives way to files with the right modes."""
    prefix = as_nobody()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = folder / "site.key"
        key.write_text("older")
        key.chmod(0o644)
        if os.geteuid() == 0:
            shutil.chown(folder, NOBODY, NOBODY)
            shutil.chown(key, NOBODY, NOBODY)
        told = run("--rotations", "1", "--keep", name, prefix=prefix, cwd=Path("/"))
        assert (told.status, told.errors) == (0, "")
        assert key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
        found = key.stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_uid == (NOBODY if os.geteuid() == 0 else os.geteuid())
    assert_tidy(told.folder)


@pytest.mark.parametrize("keep, expected", [("file", "is a file"), ("file/below", "Not a directory")])
def test_keep_takes_a_folder_only(tmp_path: Path, keep: str, expected: str) -> None:
    """A path that cannot be a folder is refused before anything starts, in words that name it."""
    (tmp_path / "file").touch()
    told = run("--keep", str(tmp_path / keep))
    assert (told.status, told.output) == (2, "")
    assert "--keep" in told.errors
    assert expected in told.errors


@pytest.mark.parametrize("no_color", ["", "1"])
def test_ctrl_c_on_a_terminal(no_color: str) -> None:
    """An interrupted demo ends what it started, removes its folder, says so and fails; a terminal has colours unless NO_COLOR is set."""
    with on_terminal(NO_COLOR=no_color) as (process, read_until):
        output = read_until("1. The parts")
        folder = folder_in(output)
        output += read_until("published after")
        assert len(processes_of(folder)) == 2
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        output += read_until("Stopped.")
        assert process.wait(DEADLINE_S) == 128 + signal.SIGINT
    assert_tidy(folder)
    assert ("\x1b" in output) is (not no_color)


@pytest.mark.parametrize("part", ["authority", "node"])
def test_a_part_that_dies_fails_the_demo(part: str) -> None:
    """The demo says which part ended and shows the last lines of its log; the other one is ended, the folder removed."""
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        output = ""
        for line in process.stdout:
            output += line
            if "published after" in line:
                break
        (victim,) = (
            pid for pid, command in processes_of(folder_in(output)).items() if f"csi_driver.cli.main {part} " in command
        )
        os.kill(victim, signal.SIGKILL)
        output += process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(DEADLINE_S) == 1
    assert f"The demo failed: certmount {part} has ended with signal 9" in errors
    assert f"The last lines of certmount {part}'s log:\n   {{" in errors
    assert "is removed" in errors
    assert_tidy(folder_in(output))


async def test_a_failed_connection_fails_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that shows a stranger's certificate for a while costs errors: they are counted, shown, and end the demo."""
    own, stranger = make_keyring(NOW), make_keyring(NOW)
    shop, cart = tmp_path / "shop", tmp_path / "cart"
    put_files(shop, own, acts.NAME)
    put_files(cart, own)
    async with serving(shop) as port:
        met = await meet(cart, port, acts.NAME)
        loop = ConnectionLoop(cart, port, acts.NAME)
        rotating = asyncio.create_task(acts.rotate(Page(), loop, met, 1))
        await until(lambda: loop.connections > 1)
        put_files(shop, stranger, acts.NAME)
        await until(lambda: loop.errors > 0)
        put_files(shop, own, acts.NAME)
        await asyncio.wait([rotating])
    failure = rotating.exception()
    assert isinstance(failure, DemoFailed)
    assert re.fullmatch(r"\d+ of \d+ connections failed; the first error: .*certificate verify failed.*", str(failure))
    assert re.search(r"connections so far, [1-9]\d* errors", capsys.readouterr().out)


async def test_a_client_of_another_authority_is_turned_away(tmp_path: Path) -> None:
    """The handshake is mutual: such a client gets no answer, and the server goes on with others."""
    own, stranger = make_keyring(NOW), make_keyring(NOW)
    shop, cart = tmp_path / "shop", tmp_path / "cart"
    put_files(shop, own, acts.NAME)
    put_files(cart, stranger)
    (cart / "root.crt").write_bytes(own.roots_pem)
    async with serving(shop) as port:
        with pytest.raises((OSError, ValueError)):
            await meet(cart, port, acts.NAME)
        put_files(cart, own)
        assert (await meet(cart, port, acts.NAME)).client.uris == (CART,)


def test_without_a_memory_folder_the_temporary_folder_is_taken(tmp_path: Path) -> None:
    """Where there is no /dev/shm the demo's folder lies where temporary files go, for its owner alone; it ends with its context."""
    with private_folder(tmp_path / "missing") as name:
        assert Path(name).parent == Path(tempfile.gettempdir())
        assert stat.S_IMODE(Path(name).stat().st_mode) == 0o700
    assert not Path(name).exists()


def as_nobody() -> Sequence[str]:
    """The start of a command line that runs the rest without root; nothing where the tests run without it anyway."""
    if os.geteuid() != 0:
        return ()
    plain = (require_program("setpriv"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    # Python and the sources may lie in root's own folders: then nobody may read everything, and nothing more.
    reading = (*plain, "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")
    # The first Python is started by root still; whether nobody may, shows with its child.
    probe = "import csi_driver.cli.main, subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    for prefix in (plain, reading):
        if (
            subprocess.run([*prefix, sys.executable, "-c", probe], cwd="/", capture_output=True, check=False).returncode
            == 0
        ):
            return prefix
    return missing("needs a Python that the user nobody may run")


@contextmanager
def on_terminal(**environment: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str], str]]]:
    """The demo on a terminal of its own, and a function that reads from there until a text has come."""
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
    """Waits for something that only looking can tell."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # counters have no event
            await asyncio.sleep(0.01)


def put_files(folder: Path, keyring: Keyring, *dns: str) -> None:
    """Puts a new certificate into a folder, file by file but each at once; without a DNS name it is web/cart's."""
    key = generate_key(KeyType.EC_P256)
    names = Names.of([DNSName.parse(name) for name in dns], [] if dns else [URI.parse(CART)])
    leaf = sign_leaf(
        Leaf(key.public_key(), names, timedelta(hours=1), (Usage.SERVER, Usage.CLIENT)), keyring.intermediate, NOW
    )
    folder.mkdir(exist_ok=True)
    for file in render_files(key, [leaf, keyring.intermediate.certificate], [keyring.root]):
        temporary = folder / f"{file.name}.new"
        temporary.write_bytes(file.content.reveal())
        temporary.replace(folder / file.name)
