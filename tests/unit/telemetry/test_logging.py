"""The formats of the log."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.telemetry.logging import FORMATS, render_logfmt

KEY = "-----BEGIN PRIVATE KEY-----\nMIGH\n-----END PRIVATE KEY-----\n"
_PAIR = re.compile(r'([a-z]+)=(?:"(?:[^"\\]|\\.)*"|[^" ]*)(?: |$)')
_PROGRAM = """
import structlog
from csi_driver.telemetry.logging import configure_logging
configure_logging("info", {!r})
structlog.get_logger().info("certificate renewed", pod="web/edge-0", names=["a", "b"], key={!r})
"""


def logged(log_format: str) -> str:
    program = _PROGRAM.format(log_format, KEY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stderr


def test_each_format_is_one_line_without_keys() -> None:
    lines = {name: logged(name) for name in FORMATS}
    assert [line.count("\n") for line in lines.values()] == [1, 1]
    fields = json.loads(lines["json"])
    assert (fields["event"], fields["pod"], fields["key"]) == ("certificate renewed", "web/edge-0", "<redacted>\n")
    _, _, rest = lines["logfmt"].partition(" ")
    expected = r'pod=web/edge-0 names="[\"a\", \"b\"]" key="\"<redacted>\\n\""'
    assert rest == f'level=info event="certificate renewed" {expected}\n'


@given(st.text())
@pytest.mark.parametrize("field", ["pod", "event"])
def test_value_cannot_forge_a_field_or_a_line(field: str, value: str) -> None:
    line = render_logfmt(None, "info", {"event": "x", "level": "info", field: value})
    assert line.isprintable()
    assert [pair[1] for pair in _PAIR.finditer(line)] == ["level", "event", *(["pod"] if field == "pod" else [])]
    assert "".join(pair[0] for pair in _PAIR.finditer(line)) == line


_CLIENT = """
import sys
import csi_driver.cli.main
import grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    print(channel.unary_unary("/test/wait").future(b"").code())
"""


async def test_grpc_writes_no_line_when_a_server_closes_the_connection(tmp_path: Path) -> None:
    called = asyncio.Event()

    async def wait(_request: bytes, _context: object) -> None:
        called.set()
        await asyncio.Event().wait()

    server = grpc.aio.server()
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"wait": grpc.unary_unary_rpc_method_handler(wait)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
    address = f"unix:{tmp_path / 'server'}"
    server.add_insecure_port(address)
    await server.start()
    env = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _CLIENT, address, stdout=PIPE, stderr=PIPE, env=env
    )
    await called.wait()
    await server.stop(None)
    assert await client.communicate() == (b"StatusCode.UNAVAILABLE\n", b"")
