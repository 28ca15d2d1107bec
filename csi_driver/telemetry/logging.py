"""Logs: one event per line on standard error. As defense in depth, tokens and keys in fields are redacted."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("json", "logfmt")
# A JSON Web Token (RFC 7519: three base64url parts, the first an object) or a PEM private key (RFC 7468).
_SECRET = re.compile(
    r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)

_MARKERS = ("eyJ", "PRIVATE KEY")  # every match of the pattern contains one of them


def configure_logging(level: str, log_format: str = "json") -> None:
    """Configure structlog for the process, and log the warnings of libraries in the same format."""
    threshold = getattr(logging, level.upper())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            render if log_format == "json" else render_logfmt,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forwarder()], level=logging.WARNING, force=True)


def render(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
    """Render an event as JSON with tokens and private keys redacted (a structlog processor)."""
    text = _encode(event)
    # Inspecting every value would cost more than all other steps, and few lines contain a marker.
    return json.dumps(redact(logger, method, event)) if any(marker in text for marker in _MARKERS) else text


_logfmt = structlog.processors.LogfmtRenderer(key_order=("timestamp", "level", "event"), drop_missing=True)


def render_logfmt(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
    """Render an event as key=value pairs (a structlog processor). No value can contain a line break or an escape sequence."""
    fields = json.loads(render(logger, method, event))
    texts = {key: value if _is_plain(value) else json.dumps(value) for key, value in fields.items()}
    return str(_logfmt(logger, method, texts))


def _is_plain(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Return the event with tokens and private keys redacted."""
    return {key: _redacted(value) for key, value in event.items()}


def _redacted(value: object) -> object:
    if isinstance(value, str):
        return _SECRET.sub("<redacted>", value) if len(value) > 16 else value  # shorter than any token
    if isinstance(value, Mapping):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return value if isinstance(value, int | float | bool | None) else _redacted(str(value))


_encode = json.JSONEncoder(default=_redacted).encode  # json.dumps would create an encoder for each line


class _Forwarder(logging.Handler):
    """Passes the records of libraries to structlog, without tracebacks, which can quote the input."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        log.log(record.levelno, record.getMessage(), **({"error": error} if error else {}))
