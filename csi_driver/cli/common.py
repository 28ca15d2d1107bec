"""What the long-running commands share: options that say what is wrong with them, and the port for probes and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from prometheus_client import CollectorRegistry

from csi_driver.telemetry.http import HealthServer

_HEARTBEAT_S = 5.0
_T = TypeVar("_T")


def parsed(parse: Callable[[str], _T]) -> Callable[..., Any]:
    """A click callback: what ``parse`` says of a wrong value is said of the option."""

    def one(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as problem:
            raise click.BadParameter(f"{text!r} {problem}") from None

    def callback(_context: click.Context, _option: click.Parameter, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(text) for text in value)
        return None if value is None else one(value)

    return callback


def address(text: str) -> str:
    """HOST:PORT as it was written; raises ValueError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("is not HOST:PORT")
    return text


def namespaced(text: str) -> tuple[str, str]:
    """NAMESPACE/NAME as a pair; raises ValueError."""
    namespace, _, name = text.partition("/")
    if not namespace or not name or "/" in name:
        raise ValueError("is not NAMESPACE/NAME")
    return namespace, name


def health_server(http: str, registry: CollectorRegistry, ready: Callable[[], Sequence[str]]) -> HealthServer:
    """The server at ``--http``; alive while the event loop that runs now turns. Raises ClickException for a port in use."""
    try:
        return HealthServer(http, registry, ready, _loop_liveness())
    except OSError as error:
        raise click.ClickException(f"--http {http}: {error.strerror}") from None


def _loop_liveness() -> Callable[[], Sequence[str]]:
    """A function for another thread: asks the running event loop for a sign of life, and says why there is none."""
    loop = asyncio.get_running_loop()

    def reasons() -> Sequence[str]:
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(_HEARTBEAT_S)
        except (TimeoutError, RuntimeError):
            return [f"the event loop has not answered for {_HEARTBEAT_S:.0f} s"]
        return []

    return reasons
