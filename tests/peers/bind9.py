"""Debian's bind9 with the zones of a test, which accept updates with a TSIG key."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import cast

import dns.asyncquery
import dns.message
import dns.rdatatype

from csi_driver.authority.issuers.acme.tsig_key import TsigKey
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.secret import Secret
from tests.peers.processes import LOOPBACK, running
from tests.support.ports import free_port
from tests.support.requirements import require_program
from tests.support.waiting import until

KEY = TsigKey("certmount", Secret(hashlib.sha256(b"certmount").digest()))
_ZONE = """\
$TTL 60
@ IN SOA ns hostmaster 1 3600 600 86400 {negative_ttl_s}
@ IN NS ns
ns IN A {public}
@ IN A 127.0.0.1
{wildcard}
{records}
"""
_PRIMARY = """\
zone "{zone}" {{
  type primary; file "{zone}.db";
  allow-transfer {{ any; }}; notify explicit; {notified}
  update-policy {{ {grants} }};
}};
"""
_SECONDARY = 'zone "{zone}" {{ type secondary; file "{zone}.db"; primaries {{ 127.0.0.1 port {primary}; }}; allow-notify {{ 127.0.0.1; }}; }};\n'
_FORWARDED = 'zone "{zone}" {{ type forward; forward only; forwarders {{ 127.0.0.1 port {port}; }}; }};\n'
_OPTIONS = """\
options {{
  directory "{directory}"; pid-file none; session-keyfile none; managed-keys-directory "{directory}";
  listen-on port {port} {{ {host}; }}; listen-on-v6 {{ none; }};
  recursion {recursion}; dnssec-validation no; querylog yes; allow-query {{ any; }}; empty-zones-enable no;
}};
controls {{ }};
key "{key}" {{ algorithm {algorithm}; secret "{secret}"; }};
"""


@dataclass(frozen=True)
class Bind9:
    """A primary or secondary server, or a resolver."""

    directory: Path
    zones: Mapping[str, str]  # Further records by zone, in master-file form
    _: KW_ONLY
    granted: frozenset[str] | None = None  # The zones in which the key can update TXT records; None for all
    key: TsigKey = KEY
    follower: int | None = None  # The port of a secondary that is notified of changes
    primary: int | None = None  # For a secondary: the port of its primary
    public: str | None = None  # The loopback address in its NS records, for :func:`fronted`; None for 127.0.0.1
    recursive: bool = False  # Whether it follows CNAMEs between its zones, like a CA's resolver
    forwarded: Mapping[str, int] = field(default_factory=dict)  # For a resolver: the ports of the servers, by zone
    host: str = LOOPBACK  # Where it listens: the address of a bridge if the authority is in a pod
    negative_ttl_s: int = 1  # How long resolvers cache that a name or type does not exist (RFC 2308 section 5)
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def key_source(self) -> FileSource:
        return key_source(self.directory, self.key)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        named = require_program("named")
        configuration = self.directory / "named.conf"
        configuration.write_text(self._configuration(), encoding="ascii")
        for zone, records in self.zones.items():
            file = self.directory / f"{zone}.db"
            if not file.exists() and self.primary is None:
                file.write_text(self._zone(records), encoding="ascii")
        log = self.directory / "named.log"
        log.touch()
        starts = _starts(log)
        async with running([named, "-4", "-g", "-c", str(configuration)], log, self.port, host=self.host):
            await until(lambda: _starts(log) > starts, "bind9 to load its zones")
            yield

    def _zone(self, records: str) -> str:
        wildcard = "" if "* IN CNAME" in records else "* IN A 127.0.0.1"  # no name has a CNAME and other records
        public = self.public or LOOPBACK
        return _ZONE.format(records=records, public=public, wildcard=wildcard, negative_ttl_s=self.negative_ttl_s)

    async def texts(self, name: str) -> set[str]:
        query = dns.message.make_query(name, dns.rdatatype.TXT)
        answer = await dns.asyncquery.tcp(query, self.host, 5, self.port)
        rrsets = [one for one in answer.answer if one.rdtype == dns.rdatatype.TXT]
        return {record.to_text().strip('"') for rrset in rrsets for record in rrset}

    def _configuration(self) -> str:
        text = _OPTIONS.format(
            directory=self.directory, host=self.host, port=self.port, key=self.key.name, algorithm=self.key.algorithm,
            secret=base64.b64encode(self.key.secret.reveal()).decode(), recursion="yes" if self.recursive else "no",
        )  # fmt: skip
        update, refuse = f"grant {self.key.name} subdomain {{zone}}. TXT;", "deny * subdomain . ANY;"
        notified = f"also-notify {{ 127.0.0.1 port {self.follower}; }};" if self.follower is not None else ""
        for zone in self.zones:
            if self.primary is not None:
                text += _SECONDARY.format(zone=zone, primary=self.primary)
                continue
            grants = update.format(zone=zone) if self.granted is None or zone in self.granted else refuse
            text += _PRIMARY.format(zone=zone, grants=grants, notified=notified)
        return text + "".join(_FORWARDED.format(zone=zone, port=port) for zone, port in self.forwarded.items())


def caching_resolver(directory: Path, servers: Mapping[str, Bind9]) -> Bind9:
    """Return a resolver that caches what the servers of these zones answer, as internal CAs use."""
    return Bind9(directory, {}, recursive=True, forwarded={zone: server.port for zone, server in servers.items()})


class _Front(asyncio.DatagramProtocol):
    """Forwards queries to another port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        task = asyncio.get_running_loop().create_task(self._forward(data, addr))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, query: bytes, addr: tuple[str, int]) -> None:
        response = await dns.asyncquery.udp(dns.message.from_wire(query), LOOPBACK, 5, self._port)
        self._transport.sendto(response.to_wire(), addr)


@contextlib.asynccontextmanager
async def fronted(server: Bind9) -> AsyncIterator[None]:
    """Also serve port 53 of the public address, which needs root. bind9 itself listens only on addresses of interfaces."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Front(server.port), (server.public or LOOPBACK, 53))
    try:
        yield
    finally:
        transport.close()


def key_source(directory: Path, key: TsigKey) -> FileSource:
    file = directory / f"{key.name}-{key.algorithm}-{hashlib.sha256(key.secret.reveal()).hexdigest()[:8]}.tsig"
    file.write_text(f"{key.algorithm}:{key.name}:{base64.b64encode(key.secret.reveal()).decode()}\n", encoding="ascii")
    return FileSource(str(file))


def _starts(log: Path) -> int:
    return log.read_text(encoding="utf-8").count("all zones loaded")
