"""Fuzz the targets: ``python -m tests.fuzz --seconds 60 [TARGET ...]``. Each target gets an equal part of the time."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_CORPUS = Path(os.environ.get("CERTMOUNT_FUZZ_CORPUS", ".fuzz"))
_GRACE_S = 120.0  # to import with instrumentation, and to finish an input
_HANG_S = 10
_MAX_OUTPUT = 4000  # characters
_MEMORY_MB = 2048  # of the process with libFuzzer's corpus and tables


@dataclass(frozen=True)
class _Result:
    target: str
    inputs: int
    findings: list[Path]
    output: str


def main() -> int:
    """Print a table of the targets; return 1 if an input violates the property."""
    arguments = _parse_arguments()
    if arguments.target:
        return _fuzz_here(arguments.target, arguments.libfuzzer)
    from tests.fuzz.targets import TARGETS  # the fuzzing process instruments it while it is imported

    if arguments.replay:
        return _replay(arguments.names[0], arguments.replay)
    names = arguments.names or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        sys.exit(f"unknown targets {', '.join(sorted(unknown))}; use {', '.join(TARGETS)}")
    workers = os.cpu_count() or 1
    seconds = max(1, int(arguments.seconds * workers / len(names)))
    for name in names:
        _write_seeds(_CORPUS / name, TARGETS[name].seeds())
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda name: _fuzz(name, seconds, TARGETS[name].max_length), names))
    return _report(results)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together (default: 60)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input of TARGET without instrumentation")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--libfuzzer", nargs=argparse.REMAINDER, default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_seeds(directory: Path, seeds: list[bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (directory / f"seed-{number}").write_bytes(seed)


def _fuzz(name: str, seconds: int, max_length: int) -> _Result:
    with tempfile.TemporaryDirectory() as artifacts:
        options = [
            f"-max_total_time={seconds}", f"-max_len={max_length}", f"-timeout={_HANG_S}",
            f"-rss_limit_mb={_MEMORY_MB}", f"-artifact_prefix={artifacts}/", "-print_final_stats=1", "-verbosity=0",
            str(_CORPUS / name),
        ]  # fmt: skip
        command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--libfuzzer", *options]
        run = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace", timeout=seconds + _GRACE_S
        )
        found = re.search(r"stat::number_of_executed_units:\s*(\d+)", run.stderr)
        findings = [_save(name, path) for path in sorted(Path(artifacts).iterdir())]
    output = "" if run.returncode == 0 else (run.stdout or run.stderr)[-_MAX_OUTPUT:].strip()
    return _Result(name, int(found[1]) if found else 0, findings, output)


def _save(name: str, artifact: Path) -> Path:
    saved = _CORPUS / "findings" / f"{name}-{artifact.name}"
    saved.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copyfile(artifact, saved)


def _fuzz_here(name: str, options: list[str]) -> int:
    import atheris  # only this process needs it

    with atheris.instrument_imports(include=["csi_driver"]):
        from tests.fuzz.limits import TooSlow, check  # instrumented
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]

    def run(data: bytes) -> None:
        try:
            check(target, data)
        except TooSlow:
            if not _fast_without_instrumentation(name, data):
                raise

    atheris.Setup([sys.argv[0], *options], run)
    atheris.Fuzz()
    return 0


def _fast_without_instrumentation(name: str, data: bytes) -> bool:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [sys.executable, "-m", "tests.fuzz", "--replay", file.name, name]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _replay(name: str, file: Path) -> int:
    from tests.fuzz.limits import Violation, check  # see main
    from tests.fuzz.targets import TARGETS

    data = file.read_bytes()
    try:
        check(TARGETS[name], data)
    except Violation as violation:
        print(violation)
        return 1
    return 0


def _report(results: list[_Result]) -> int:
    for result in results:
        state = "ok" if not result.output else "FAILED"
        print(f"{result.target:16} {result.inputs:10,} inputs  {state}")
    print(f"{'total':16} {sum(result.inputs for result in results):10,} inputs")
    failed = [result for result in results if result.output or not result.inputs]
    for result in failed:
        print(f"\n--- {result.target}\n{result.output}")
        for path in result.findings:
            print(f"replay: python -m tests.fuzz --replay {path} {result.target}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
