"""The contents of a volume as the driver stores them for itself: the pod's files can have any names and formats."""

from __future__ import annotations

import json
from typing import Any

from csi_driver.core.bounded_json import loads_bounded
from csi_driver.core.certificates.keys import encode_key, load_key
from csi_driver.core.formats.file_format import StorePassword, VolumeContents
from csi_driver.core.formats.pem import decode_certificates, encode_certificates
from csi_driver.core.secret import Secret

MAX_STORED_BYTES = 1 << 20


def encode_contents(contents: VolumeContents) -> Secret[bytes]:
    """Return the contents as JSON with PEM."""
    password = contents.password
    values = {
        "key": encode_key(contents.key).reveal().decode() if contents.key is not None else None,
        "chain": encode_certificates(contents.chain).decode(),
        "roots": encode_certificates(contents.roots).decode(),
        "password": password.value.reveal().decode() if password is not None else None,
        "generated": password is not None and password.generated,
        "renew_at": contents.renew_at,
    }
    return Secret(json.dumps(values, separators=(",", ":")).encode())


def decode_contents(stored: Secret[bytes]) -> VolumeContents:
    """Parse what :func:`encode_contents` returned. Raises ValueError, which never contains the input."""
    values = loads_bounded(stored.reveal(), max_bytes=MAX_STORED_BYTES)
    try:
        key, password = values["key"], values["password"]
        return VolumeContents(
            load_key(Secret(key.encode())) if key is not None else None,
            _certificates(values["chain"]),
            _certificates(values["roots"]),
            StorePassword(Secret(password.encode()), bool(values["generated"])) if password is not None else None,
            float(values["renew_at"]) if values["renew_at"] is not None else None,
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError("is not the stored contents of a volume") from None


def _certificates(pem: Any) -> tuple[Any, ...]:
    return tuple(decode_certificates(pem.encode())) if pem else ()
