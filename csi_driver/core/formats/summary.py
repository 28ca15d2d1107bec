"""``generation.json``: facts about the certificate and the roots of a volume, for scripts and people."""

from __future__ import annotations

import json

from cryptography.hazmat.primitives.hashes import SHA256

from csi_driver.core.formats.file_format import VolumeContents
from csi_driver.core.texts import timestamp

SUMMARY_FILE = "generation.json"


def render_summary(contents: VolumeContents) -> bytes:
    """Return a JSON object. Times are in UTC (RFC 3339); serial number and fingerprints are hexadecimal."""
    leaf = contents.chain[0] if contents.chain else None
    summary = {
        "serial": f"{leaf.serial_number:x}" if leaf else None,
        "not_before": timestamp(leaf.not_valid_before_utc) if leaf else None,
        "not_after": timestamp(leaf.not_valid_after_utc) if leaf else None,
        "renew_at": timestamp(contents.renew_at) if contents.renew_at is not None else None,
        "issuer": leaf.issuer.rfc4514_string() if leaf else None,
        "sha256": leaf.fingerprint(SHA256()).hex() if leaf else None,
        "roots_sha256": [root.fingerprint(SHA256()).hex() for root in contents.roots],
    }
    return json.dumps(summary, indent=1).encode() + b"\n"
