"""Options and helpers that commands share."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import click
from prometheus_client import CollectorRegistry

from csi_driver.core.addresses import Address, parse_address, parse_listen_address
from csi_driver.core.errors import CertmountError
from csi_driver.telemetry.http import HealthServer
from csi_driver.telemetry.logging import FORMATS, LEVELS
from csi_driver.telemetry.process_metrics import register_process_metrics

PATH = click.Path(path_type=Path)
Option: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]
_LIVENESS_TIMEOUT_S = 5.0
_T = TypeVar("_T")


def parsed(parse: Callable[[str], _T]) -> Callable[..., Any]:
    """Return a click callback that reports ``parse``'s ValueError as an error of the option."""

    def parse_one(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} {error}") from None

    def callback(_context: click.Context, _option: click.Parameter, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(parse_one(text) for text in value)
        return None if value is None else parse_one(value)

    return callback


def option(
    name: str, text: str, parse: Callable[[str], object] | None = None, *parameter: str, **settings: Any
) -> Option:
    """Return an option whose help has this text and its default. ``parse`` raises ValueError."""
    callback = parsed(parse) if parse else None
    return click.option(name, *parameter, help=text, callback=callback, show_default=True, **settings)


def add_options(*options: Option) -> Option:
    """Return a decorator that adds the options in this order."""
    return lambda function: functools.reduce(lambda inner, each: each(inner), reversed(options), function)


@contextlib.contextmanager
def errors_for_users() -> Iterator[None]:
    """Raise a CertmountError of the block as ClickException, which click prints."""
    try:
        yield
    except CertmountError as error:
        raise click.ClickException(str(error)) from None


def echo_report(output: str, document: object, lines: Iterable[str]) -> None:
    """Print the document if ``--output`` is json, else the lines."""
    for line in [json.dumps(document, indent=2)] if output == "json" else lines:
        click.echo(line)


def parse_namespaced_name(text: str) -> tuple[str, str]:
    """Return NAMESPACE/NAME as a pair. Raises ValueError."""
    namespace, _, name = text.partition("/")
    if not namespace or not name or "/" in name:
        raise ValueError("is not NAMESPACE/NAME")
    return namespace, name


log_options = add_options(
    option("--log-level", "Lowest level to log.", type=click.Choice(LEVELS), default="info"),
    option(
        "--log-format",
        "Format of the log: an object or key=value pairs in each line.",
        type=click.Choice(FORMATS),
        default="json",
    ),
)


def http_option(port: int) -> Option:
    """Return the option ``--http``, with this port by default."""
    text = "HOST:PORT for /healthz, /readyz and /metrics; :PORT for all addresses, IPv4 and IPv6."
    return option("--http", text, parse_listen_address, default=f":{port}")


def authority_options(client: str, audience: str) -> Option:
    """Return the options ``--authority``, ``--authority-root`` and ``--token`` for a client of the authority."""
    return add_options(
        option(
            "--authority",
            "HOST:PORT of the authority.",
            lambda text: str(parse_address(text)),
            default="certmount-authority.certmount.svc:443",
        ),
        option(
            "--authority-root",
            "PEM file with the root certificates that verify the authority's TLS certificate. "
            f"The {client} waits for the file.",
            type=PATH,
            default="/etc/certmount/root/authority.crt",
        ),
        option(
            "--token",
            f"File with the {client}'s service account token for the audience {audience}.",
            type=PATH,
            default="/var/run/secrets/certmount/token",
        ),
    )


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def health_server(
    http: Address,
    registry: CollectorRegistry,
    ready: Callable[[], Sequence[str]],
    admin_pages: Mapping[str, Callable[[], Awaitable[object]]] | None = None,
    started: Callable[[], Awaitable[Sequence[str]]] | None = None,
) -> HealthServer:
    """Return the server for ``--http``; it is live while the running event loop responds. Raises ClickException.

    ``admin_pages`` run in that event loop and return what ``json.dumps`` accepts. ``started`` is the page ``/startupz``.
    """
    loop = asyncio.get_running_loop()

    async def in_loop(page: Callable[[], Awaitable[object]]) -> bytes:  # runs in the server's thread and event loop
        async def run() -> bytes:
            return json.dumps(await page(), separators=(",", ":")).encode()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), loop))

    async def live() -> Sequence[str]:  # runs in the server's thread and event loop
        response = asyncio.sleep(0)
        try:
            answer = asyncio.run_coroutine_threadsafe(response, loop)
            await asyncio.wait_for(asyncio.wrap_future(answer), _LIVENESS_TIMEOUT_S)
        except (TimeoutError, RuntimeError):
            response.close()
            return [f"the event loop has not responded for {_LIVENESS_TIMEOUT_S:.0f} s"]
        return []

    register_process_metrics(registry)
    try:
        pages = {path: functools.partial(in_loop, page) for path, page in (admin_pages or {}).items()}
        return HealthServer(http, registry, ready, live, pages, started)
    except OSError as error:
        raise click.ClickException(f"--http {http}: {error.strerror}") from None
