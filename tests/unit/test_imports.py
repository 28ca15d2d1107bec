"""The programs do without modules that need much memory; other code can still import them."""

from __future__ import annotations

import subprocess
import sys

import pytest

_NODE = """
import sys
sys.modules["rich"] = None  # a development dependency, which structlog imports
import csi_driver.cli.node
import prometheus_client
print(*(name for name in ("ssl", "_ssl", "_hashlib", "http.server", "http.client", "urllib.request", "html", "csi_driver.authority")
        if name in sys.modules))
import ssl, http.server, urllib.request, hashlib
assert ssl.create_default_context().verify_mode is ssl.CERT_REQUIRED
assert issubclass(http.server.ThreadingHTTPServer, http.server.HTTPServer)
assert hashlib.sha256(b"abc").hexdigest().startswith("ba7816bf")
assert prometheus_client.generate_latest(prometheus_client.CollectorRegistry()) == b""
"""


_AUTHORITY = """
import sys
import csi_driver.cli.authority, csi_driver.cli.secrets, csi_driver.authority.cluster_environment, csi_driver.secrets.controller
print(*(name for name in ("kubernetes", "pydantic") if name in sys.modules))
"""


@pytest.mark.parametrize("script", [_NODE, _AUTHORITY], ids=["node", "authority"])
def test_program_does_not_import(script: str) -> None:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("", "")
