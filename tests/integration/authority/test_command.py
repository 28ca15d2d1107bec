"""``certmount authority`` as a process: options, signals, logs and ``--check``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from csi_driver.cli.authority import command
from csi_driver.core.secret import Secret
from tests.integration.authority.test_attacks import CSRS, NODE_TOKENS, POD_TOKENS
from tests.integration.authority.world import POD, SERVING_NAME, SHOP, Caller, Controller, World
from tests.support.driver import http_get, started
from tests.support.ports import free_port
from tests.support.tokens import CONTROLLER, TokenIssuer
from tests.support.waiting import until

MAIN = [sys.executable, "-m", "csi_driver.cli.main", "authority"]


class Process:
    """An authority process without a cluster."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.port, self.http = free_port(), free_port()
        self.log = world.folder / "log"
        jwks = world.folder / "jwks.json"
        jwks.write_bytes(world.issuer.published.jwks)
        self.arguments = [
            f"--listen=127.0.0.1:{self.port}",
            f"--http=127.0.0.1:{self.http}",
            f"--policy={world.policy}",
            f"--serving-name={SERVING_NAME}",
            f"--ca-dir={world.ca}",
            f"--jwks={jwks}",
            f"--token-issuer={world.issuer.name}",
            "--log-level=debug",
        ]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[subprocess.Popen[bytes]]:
        with self.started() as process:
            await until(lambda: self.get("/readyz") == (200, "ok\n") or process.poll() is not None, "the authority")
            assert process.poll() is None, self.log.read_text()
            yield process

    def started(self) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return started("authority", *self.arguments, log=self.log)

    def get(self, path: str) -> tuple[int, str]:
        return http_get(f"http://127.0.0.1:{self.http}{path}")


@pytest.fixture
def process(idle_world: World) -> Process:
    return Process(idle_world)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_authority_serves_until_a_signal(number: signal.Signals, process: Process) -> None:
    async with process.running() as running, process.world.channel(port=process.port) as channel:
        caller = Caller(process.world, channel)
        assert len((await caller.issue()).chain) == 2
        stream = caller.watch()
        await stream.read()
        assert process.get("/healthz") == (200, "ok\n")
        metrics = process.get("/metrics")[1]
        assert 'certmount_authority_calls_total{method="Issue",reason="Ok"} 1.0' in metrics
        assert "certmount_policy_valid 1.0" in metrics
        running.send_signal(number)
        assert await stream.read() == grpc.aio.EOF
        assert await asyncio.to_thread(running.wait, 10) == 0
    events = [json.loads(line)["event"] for line in process.log.read_text().splitlines()]
    assert events[0].startswith("no cluster is configured: a token is valid until it expires")
    assert events[-2:] == ["stopping", "stopped"]


async def test_restart_keeps_the_ca(process: Process) -> None:
    async with process.running():
        root = (process.world.ca / "root.crt").read_bytes()
    async with process.running():
        assert (process.world.ca / "root.crt").read_bytes() == root


async def test_tokens_and_keys_are_not_in_logs_metrics_and_responses(process: Process, issuer: TokenIssuer) -> None:
    pod_token, node_token = issuer.pod_token(POD), issuer.node_token()
    pods = [make(issuer) for make, _ in POD_TOKENS.values()]
    nodes = [make(issuer) for make, _ in NODE_TOKENS.values()]
    async with process.running() as running, process.world.channel(port=process.port) as channel:
        caller = Caller(process.world, channel)
        await caller.issue(pod=pod_token, node=node_token)
        responses = [str(await caller.rejected(pod=token)) for token in pods]
        responses += [str(await caller.rejected(node=token)) for token in nodes]
        responses += [str(await caller.rejected(csr=make(process.world))) for make, _ in CSRS.values()]
        responses.append(process.get("/metrics")[1])
        running.send_signal(signal.SIGTERM)
        await asyncio.to_thread(running.wait, 20)
    written = process.log.read_text() + "".join(responses)
    assert '"decision": "issued"' in written
    assert not any(part in written for token in (pod_token, node_token, *pods, *nodes) for part in parts(token))
    assert "PRIVATE KEY" not in written
    for value in json.loads((process.world.ca / "ca.json").read_text()).values():
        assert value[40:80] not in written


async def test_process_serves_the_secrets_controller(process: Process, issuer: TokenIssuer) -> None:
    """Its tokens are not in logs, metrics and responses."""
    process.arguments.append("--secrets-service-account=certmount/certmount-secrets")
    process.world.policy.write_text(
        f"policy: [{{match: {{namespaces: [shop], secrets: ['*']}}, allow: {{dns: [{SHOP}]}}}}]"
    )
    other = replace(CONTROLLER, service_account="other")
    tokens = [
        issuer.controller_token(),
        issuer.controller_token(other),
        issuer.controller_token(exp=1),
        issuer.node_token(),
    ]
    async with process.running(), process.world.channel(port=process.port) as channel:
        controller = Controller(process.world, channel)
        assert len((await controller.issue(token=tokens[0])).chain) == 2
        assert dict((await controller.watch(tokens[0]).read()).environments) == {"internal": "internal"}
        failures = [await controller.rejected(token=token) for token in tokens[1:]]
        assert [failure.reason for failure in failures] == ["TokenRejected", "TokenExpired", "TokenRejected"]
        failures.append(await controller.rejected("bank.example.com", token=tokens[0]))
        metrics = process.get("/metrics")[1]
        assert 'certmount_authority_calls_total{method="Secrets.Issue",reason="Ok"} 1.0' in metrics
    written = process.log.read_text() + "".join([metrics, *(failure.text for failure in failures)])
    assert '"requester": "secret shop/shop-tls"' in written
    assert not any(part in written for token in tokens for part in parts(token))


def parts(token: Secret[str]) -> list[str]:
    pieces = token.reveal().split(".")[1:] or [token.reveal()]
    return [piece[:40] for piece in pieces if len(piece) > 16]


DIRECTORY = ["--ca-dir=ca", "--jwks=jwks", "--token-issuer=https://issuer.test"]
CLUSTER = ["--ca-secret=certmount/ca", "--root-configmap=certmount/root"]
REQUIRED = ["--policy=policy.yaml", "--serving-name=localhost"]


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([], "Missing option '--policy'"),
        (["--policy=policy.yaml", *DIRECTORY], "Missing option '--serving-name'"),
        (
            REQUIRED,
            "--ca-secret, --root-configmap: required in a cluster; required without a cluster: --ca-dir, --jwks,",
        ),
        ([*REQUIRED, *DIRECTORY, *CLUSTER], "use one set"),
        ([*REQUIRED, *DIRECTORY[:2]], "--token-issuer: required with --ca-dir, --jwks"),
        ([*REQUIRED, *CLUSTER[:1]], "--root-configmap: required with --ca-secret"),
        ([*REQUIRED, *DIRECTORY, "--listen=8443"], "Invalid value for '--listen': '8443' is not HOST:PORT"),
        ([*REQUIRED, *DIRECTORY, "--http=localhost:99999"], "Invalid value for '--http'"),
        ([*REQUIRED, *DIRECTORY, "--trust-domain=Big"], "'--trust-domain': 'Big' is not a trust domain"),
        ([*REQUIRED, *DIRECTORY, "--cluster-domain=a..b"], "'--cluster-domain': 'a..b' has the label ''"),
        ([*REQUIRED, *DIRECTORY, "--serving-name=10.0.0.1"], "'10.0.0.1' is a number or an IP address"),
        ([*REQUIRED, *DIRECTORY, "--node-service-account=a"], "'--node-service-account': 'a' is not NAMESPACE/NAME"),
        (
            [*REQUIRED, *DIRECTORY, "--secrets-service-account=a"],
            "'--secrets-service-account': 'a' is not NAMESPACE/NAME",
        ),
        ([*REQUIRED, "--ca-secret=a/b/c"], "'--ca-secret': 'a/b/c' is not NAMESPACE/NAME"),
        ([*REQUIRED, *DIRECTORY, "--log-level=loud"], "Invalid value for '--log-level'"),
        ([*REQUIRED, *DIRECTORY, "--verbose"], "No such option"),
    ],
)
def test_invalid_option_is_named(arguments: list[str], words: str) -> None:
    result = CliRunner(env=dict.fromkeys(os.environ, "")).invoke(command, arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda process: process.world.policy.unlink(), "cannot be read: No such file or directory; see --policy"),
        (lambda process: process.world.policy.write_text("policy: 7"), "policy (line 1): is not a list"),
        (lambda process: write_invalid_ca(process.world.ca), "ca.json: is damaged"),
        (lambda process: process.arguments.append(f"--http=127.0.0.1:{process.port}"), "--http"),
    ],
    ids=["missing policy", "invalid policy", "invalid CA", "port in use"],
)
async def test_start_failure_is_reported_without_a_traceback(change: object, words: str, process: Process) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        change(process)  # type: ignore[operator]  # a function
        if words == "--http":
            process.arguments.append(f"--http=127.0.0.1:{taken.getsockname()[1]}")
        with process.started() as running:
            assert await asyncio.to_thread(running.wait, 30) == 1
    log = process.log.read_text()
    assert words in log
    assert "Traceback" not in log


async def test_authority_waits_for_the_token_keys(process: Process) -> None:
    jwks = process.world.folder / "jwks.json"
    content = jwks.read_bytes()
    jwks.unlink()
    with process.started():
        await until(lambda: "see --jwks" in process.log.read_text(), "the first attempt")
        assert "the cluster's token keys are not loaded" in process.get("/readyz")[1]
        jwks.write_bytes(content)
        await until(lambda: process.get("/readyz") == (200, "ok\n"), "the authority")


def test_cluster_options_fail_without_a_cluster() -> None:
    main = [*MAIN, *REQUIRED, *CLUSTER, "--http=127.0.0.1:0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KUBERNETES_")}
    result = subprocess.run(main, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "TokenReviewUnavailable: cluster: no in-cluster configuration: " in result.stderr
    assert "Traceback" not in result.stderr


def write_invalid_ca(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    file = directory / "ca.json"
    file.write_text("{")
    file.chmod(0o600)


def check(process: Process) -> tuple[int, list[str]]:
    main = [*MAIN, "--check", *process.arguments]
    done = subprocess.run(main, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.splitlines()


def test_check_prints_a_line_for_each_check_and_changes_nothing(process: Process) -> None:
    status, lines = check(process)
    assert status == 0
    names = [line.partition(":")[0] for line in lines]
    assert names == ["ok   policy", "ok   certificate authority", "ok   token keys"]
    assert not process.world.ca.exists()


def test_check_reports_all_faults_and_fails(process: Process) -> None:
    process.world.policy.write_text("policy:\n- match: {namespaces: [a]}\n")
    (process.world.folder / "jwks.json").write_text("{}")
    write_invalid_ca(process.world.ca)
    status, lines = check(process)
    assert (status, {line[:5] for line in lines}) == (1, {"FAIL "})
    text = "\n".join(lines)
    for words in ("policy[0].allow (line 2): is missing", "ca.json: is damaged", "is not a JSON Web Key Set"):
        assert words in text
