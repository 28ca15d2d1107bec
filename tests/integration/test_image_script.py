"""``scripts/image load`` finds the cluster, or says what to do. The cluster's programs only record how they are called.

The end-to-end tests build the real image and load it into a real containerd with the same script.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "image"
IMAGE = "localhost/certmount:test"
DIGEST = f"sha256:{'0' * 64}"
PLATFORMS = "linux/amd64,linux/arm64"
_DOCKER = 'if [ "$1" = save ]; then touch "$3"; fi'
_SYSTEM = ("bash", "cat", "dirname", "env", "grep", "mktemp", "rm", "sed", "tee", "touch")


def run(
    directory: Path, programs: dict[str, str], *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the script with these programs (shell scripts by name) on PATH, which write their calls to the file ``calls``."""
    path = directory / "bin"
    path.mkdir()
    for name in _SYSTEM:
        (path / name).symlink_to(next(found for base in ("/usr/bin", "/bin") if (found := Path(base, name)).exists()))
    for name, script in programs.items():
        (path / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{directory}/calls\n{script}\n')
        (path / name).chmod(0o755)
    variables = {"PATH": str(path), "IMAGE": IMAGE, "HOME": str(directory), **environment}
    command = [str(SCRIPT), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def calls(directory: Path) -> list[str]:
    lines = (directory / "calls").read_text().splitlines()
    return [re.sub(r"/tmp/tmp\.\w+\.tar", "ARCHIVE", line) for line in lines]


_CLUSTERS = [
    ("kind-dev", {"kind": ""}, "kind load image-archive ARCHIVE --name dev"),
    (
        "minikube",
        {"minikube": """if [ "$1" = profile ]; then echo '{"valid":[{"Name":"minikube"}]}'; fi"""},
        "minikube --profile minikube image load ARCHIVE",
    ),
]


@pytest.mark.parametrize("context, programs, expected", _CLUSTERS, ids=[context for context, _, _ in _CLUSTERS])
def test_image_is_loaded_into_the_cluster_of_the_context(
    context: str, programs: dict[str, str], expected: str, tmp_path: Path
) -> None:
    done = run(tmp_path, {"docker": _DOCKER, "kubectl": f"echo {context}", **programs}, "load")
    assert done.returncode == 0, done.stderr
    assert f"docker save --output ARCHIVE {IMAGE}" in calls(tmp_path)
    assert calls(tmp_path)[-1] == expected


def test_socket_of_containerd_has_precedence(tmp_path: Path) -> None:
    programs = {"docker": _DOCKER, "kubectl": "echo kind-dev", "kind": "", "ctr": ""}
    done = run(tmp_path, programs, "load", CONTAINERD_ADDRESS="/run/c.sock")
    assert done.stdout == f"image: loaded {IMAGE} into containerd (/run/c.sock)\n"
    assert calls(tmp_path)[-1] == "ctr --address /run/c.sock --namespace k8s.io images import ARCHIVE"


def test_without_a_cluster_the_message_says_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path, {"docker": _DOCKER, "kubectl": "exit 1"}, "load")
    assert done.returncode == 1
    assert done.stderr == (
        "image: found no cluster on this machine: the context of kubectl is neither kind nor minikube, and there is no "
        "containerd that this user can write to. Push the image to a registry instead (make image-push "
        "IMAGE=registry.example.com/certmount:dev), or run `make image-load` as root on each node\n"
    )


def test_docker_without_its_daemon_is_not_used(tmp_path: Path) -> None:
    buildah = 'if [ "$1" = build ]; then exit 0; fi'
    done = run(tmp_path, {"docker": "exit 1", "buildah": buildah}, "build", SOURCE_DATE_EPOCH="5")
    assert done.returncode == 0, done.stderr
    last = calls(tmp_path)[-1]
    assert last.startswith("buildah build --layers --timestamp 5 --label org.opencontainers.image.title=certmount")
    assert last.endswith(f"-t {IMAGE} {SCRIPT.parents[1]}")
    assert "build-arg" not in last


@pytest.mark.parametrize("action, platforms", [("build", ""), ("build", PLATFORMS), ("push", PLATFORMS)])
def test_packages_come_from_the_index_of_the_environment(action: str, platforms: str, tmp_path: Path) -> None:
    """The Dockerfile declares the argument. Its value is not on a command line, because it can contain a password."""
    done = run(tmp_path, {"docker": ""}, action, PLATFORMS=platforms, PIP_INDEX_URL="https://user:secret@pip.test")
    assert done.returncode == 0, done.stderr
    assert " --build-arg PIP_INDEX_URL " in calls(tmp_path)[-1]
    assert "\nARG PIP_INDEX_URL\n" in (SCRIPT.parents[1] / "Dockerfile").read_text()


def test_several_platforms_are_one_image(tmp_path: Path) -> None:
    done = run(tmp_path, {"buildah": ""}, "build", PLATFORMS=PLATFORMS)
    assert done.returncode == 0, done.stderr
    assert f" --platform {PLATFORMS} --manifest {IMAGE} " in calls(tmp_path)[-1]


@pytest.mark.parametrize(
    "programs, platforms",
    [
        ({"docker": f'if [ "$1" = push ]; then echo "dev: digest: {DIGEST} size: 1574"; fi'}, ""),
        (
            {"docker": f"""if [ "$1" = buildx ]; then echo '  "containerimage.digest": "{DIGEST}"' >"$METADATA"; fi"""},
            PLATFORMS,
        ),
        ({"buildah": f'if [ "$1" = push ]; then echo {DIGEST} >"$3"; fi'}, ""),
        ({"podman": f'if [ "$1" = manifest ]; then echo {DIGEST} >"$5"; fi'}, PLATFORMS),
    ],
    ids=["docker", "docker for platforms", "buildah", "podman for platforms"],
)
def test_push_prints_only_the_digest(programs: dict[str, str], platforms: str, tmp_path: Path) -> None:
    """The release signs what it prints."""
    script = {name: text.replace("$METADATA", "${@: -4:1}") for name, text in programs.items()}
    script = {name: f"{text}; echo progress >&2" for name, text in script.items()}
    done = run(tmp_path, script, "push", PLATFORMS=platforms)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{DIGEST}\n"
    assert IMAGE in calls(tmp_path)[-1]


def test_without_an_engine_the_message_says_what_to_install(tmp_path: Path) -> None:
    done = run(tmp_path, {}, "build")
    assert (done.returncode, done.stderr) == (
        1,
        "image: needs Docker, Podman or Buildah; install one of them, and start Docker's daemon if you use Docker\n",
    )
