"""The root that signs only the authority's serving certificate. Nodes pin it.

It is separate from the internal CA, so nodes can reach the authority whatever happens to that CA: a rotation, name
constraints, or a key type that TLS libraries don't support yet.
"""

from __future__ import annotations

from datetime import datetime

from csi_driver.authority.ca.key_pairs import CAKeyPair, make_root
from csi_driver.authority.ca.keyring_loader import CertificateReader
from csi_driver.authority.storage import Store, Values, serving_part, update
from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from csi_driver.core.stored_secrets import StoredSecrets

SERVING, SERVING_KEY = "serving.crt", "serving.key"  # the values in the store of the CA
_HINT = "restore the correct value, or delete serving.crt and serving.key to create new ones"


def make_serving_root(now: datetime) -> CAKeyPair:
    """Create a self-signed EC P-256 certificate for ten years. Its subject tells people what it is."""
    return make_root("authority", generate_key(KeyType.EC_P256), now, path_length=0)


def encode_serving_root(root: CAKeyPair) -> Values:
    """Return the values for a store (PEM); :func:`load_serving_root` reads them."""
    return {SERVING: Secret(encode_certificates([root.certificate])), SERVING_KEY: encode_key(root.key)}


def load_serving_root(values: Values, now: datetime, *, where: str) -> CAKeyPair | None:
    """Return the root in the values of a store, which ``where`` names in errors; None if neither value exists.

    Raises CertmountError InvalidCA, with all faults.
    """
    reader = CertificateReader(values, f"{where} ", _HINT)
    if not reader.has(SERVING) and not reader.has(SERVING_KEY):
        return None
    certificates, key = reader.certificates(SERVING), reader.key(SERVING_KEY, None)
    if len(certificates) > 1:
        reader.fault(SERVING, f"contains {len(certificates)} certificates; expected one")
    reader.check_self_signed(SERVING, certificates)
    reader.check_key(SERVING_KEY, key, certificates, SERVING)
    for certificate in certificates:
        reader.check_validity(SERVING, certificate, now)
    if reader.faults or key is None:
        raise CertmountError(Reason.INVALID_CA, *reader.faults)
    return CAKeyPair(certificates[0], key.key)


async def current_serving_root(store: Store, now: datetime) -> CAKeyPair:
    """Return the root that all replicas share; create it if the store has none.

    Raises CertmountError InvalidCA for invalid values, or what the store raises.
    """

    async def step(stored: StoredSecrets) -> tuple[Values | None, CAKeyPair]:
        if root := load_serving_root(stored.values, now, where=store.name):
            return None, root
        root = make_serving_root(now)
        return encode_serving_root(root), root

    return await update(serving_part(store), step)
