"""Imports libraries of the node driver without standard modules that they need only for features that it does not use.

asyncio and hashlib import OpenSSL, but the driver's TLS is that of gRPC; prometheus_client imports HTTP servers and clients,
but :mod:`csi_driver.telemetry.http` serves the metrics. Without them, the driver needs 7 MB less memory on every node. Import
this module before any other that imports one of the libraries. Later imports of the hidden modules work as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_SERVERS_AND_CLIENTS = ("http.server", "socketserver", "ssl", "urllib.error", "urllib.request", "wsgiref.simple_server")


class _Unused(ModuleType):
    """A module in which each name is an empty class, because prometheus_client derives its servers from such classes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def _hidden(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """Replace modules that are not imported yet; None makes their import fail, as on a Python that was built without them."""
    replaced = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(replaced)  # type: ignore[arg-type]  # None is documented in the import system's reference
    try:
        yield
    finally:
        for name in replaced:
            del sys.modules[name]


with _hidden({"ssl": None, "_hashlib": None}):
    import asyncio  # noqa: F401
    import hashlib  # noqa: F401
    import hmac  # noqa: F401
with _hidden({name: _Unused(name) for name in _SERVERS_AND_CLIENTS}):
    import prometheus_client  # noqa: F401
