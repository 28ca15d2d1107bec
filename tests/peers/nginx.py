"""Debian's nginx as a reverse proxy that routes HTTP-01 requests to the authority."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.peers.processes import LOOPBACK, running
from tests.support.ports import free_port
from tests.support.requirements import require_program

_CONFIGURATION = """\
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;
events {{ }}
http {{
  access_log {folder}/access.log; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    {locations}
    location / {{ return 200 "the site\\n"; }}
  }}
}}
"""
ROUTE = "location /.well-known/acme-challenge/ {{ proxy_pass http://{address}; }}"  # The route in docs/acme.md


@dataclass(frozen=True)
class Nginx:
    """A server for all names."""

    directory: Path
    locations: str
    port: int = field(default_factory=free_port)

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def requests(self) -> list[str]:
        return (self.directory / "access.log").read_text(encoding="utf-8").splitlines()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        configuration = self.directory / "nginx.conf"
        text = _CONFIGURATION.format(folder=self.directory, port=self.port, locations=self.locations)
        configuration.write_text(text, encoding="ascii")
        arguments = [require_program("nginx"), "-e", str(self.directory / "error.log"), "-c", str(configuration)]
        async with running(arguments, self.directory / "nginx.log", self.port):
            yield
