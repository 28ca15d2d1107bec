"""Options and helpers that the long-running commands share."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from prometheus_client import CollectorRegistry

from csi_driver.telemetry.http import HealthServer
from csi_driver.telemetry.logging import LEVELS

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


def parse_address(text: str) -> str:
    """Return HOST:PORT unchanged. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("is not HOST:PORT")
    return text


def parse_namespaced_name(text: str) -> tuple[str, str]:
    """Return NAMESPACE/NAME as a pair. Raises ValueError."""
    namespace, _, name = text.partition("/")
    if not namespace or not name or "/" in name:
        raise ValueError("is not NAMESPACE/NAME")
    return namespace, name


log_level_option = click.option(
    "--log-level", type=click.Choice(LEVELS), default="info", show_default=True, help="Lowest level to log."
)


def http_option(port: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option ``--http``, with this port by default."""
    return click.option(
        "--http",
        default=f"0.0.0.0:{port}",
        show_default=True,
        callback=parsed(parse_address),
        help="HOST:PORT for /healthz, /readyz and /metrics.",
    )


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def health_server(http: str, registry: CollectorRegistry, ready: Callable[[], Sequence[str]]) -> HealthServer:
    """Return the server for ``--http``; it is live while the running event loop responds. Raises ClickException."""
    loop = asyncio.get_running_loop()

    def live() -> Sequence[str]:  # runs in another thread
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(_LIVENESS_TIMEOUT_S)
        except (TimeoutError, RuntimeError):
            return [f"the event loop has not responded for {_LIVENESS_TIMEOUT_S:.0f} s"]
        return []

    try:
        return HealthServer(http, registry, ready, live)
    except OSError as error:
        raise click.ClickException(f"--http {http}: {error.strerror}") from None
