"""Builds the programs of examples/hello-mtls."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from tests.support.documentation import ROOT
from tests.support.requirements import require_program

EXAMPLES: Final = ROOT / "examples" / "hello-mtls"
_CACHE: Final = Path(os.environ.get("CERTMOUNT_CACHE", str(Path.home() / ".cache" / "certmount")))


@contextlib.contextmanager
def rust_cache(name: str) -> Iterator[Path]:
    """Return a directory for the builds of a crate, which no other process uses meanwhile. Crates must not share it.

    To cargo, a copy of the crate in another directory is the same crate, and it compares only the times of files. So
    write a changed copy, and take its programs, in this context.
    """
    target = _CACHE / name
    target.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield target


def build_rust(crate: Path, target: Path, directory: Path) -> None:
    """Build the programs of a crate in a directory of :func:`rust_cache`, and copy them to another one."""
    command = [require_program("cargo"), "build", "--quiet", "--release", "--locked", "--target-dir", str(target)]
    subprocess.run(command, cwd=crate, check=True, timeout=900)
    for name in ("server", "client"):
        shutil.copy(target / "release" / name, directory)


def _rust(source: Path, directory: Path) -> None:
    with rust_cache("hello-mtls-rust") as target:
        build_rust(source, target, directory)


def _go(source: Path, directory: Path) -> None:
    command = [require_program("go"), "build", "-o", f"{directory}/", "./server", "./client"]
    subprocess.run(command, cwd=source, env={**os.environ, "CGO_ENABLED": "0"}, check=True, timeout=300)


def _java(source: Path, directory: Path) -> None:
    files = [str(file) for file in sorted(source.glob("*.java"))]
    subprocess.run([require_program("javac"), "-d", str(directory), *files], check=True, timeout=120)


def _copy(source: Path, directory: Path) -> None:
    for file in source.iterdir():
        shutil.copy(file, directory)


_BUILD: Final[Mapping[str, Callable[[Path, Path], None]]] = {
    "go": _go,
    "java": _java,
    "nginx": _copy,
    "node": _copy,
    "python": _copy,
    "rust": _rust,
}
LANGUAGES: Final = tuple(_BUILD)
PROGRAMS: Final = {"java": "java", "nginx": "nginx", "node": "node", "python": "python3"}
"""What runs the examples that are not programs themselves."""


def build(language: str, directory: Path) -> None:
    """Write what the image of an example has in ``/app`` to a directory."""
    _BUILD[language](EXAMPLES / language, directory)
