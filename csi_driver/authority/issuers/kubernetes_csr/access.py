"""What such an issuer needs beside its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from csi_driver.authority.csr_api import CSRClient


@dataclass(frozen=True, slots=True)
class Access:
    """The cluster, for issuers of this kind."""

    requests: CSRClient
    internal_roots: Callable[[], tuple[bytes, ...]] = tuple
    """Of the internal CA: X.509 DER; none where it is not known."""
