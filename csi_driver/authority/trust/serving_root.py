"""The authority's own small CA, which nodes pin. It signs the authority's serving certificate and nothing else.

It is apart from the CA of the pods, so that whatever that is or becomes (rotated, constrained to some names, of a kind
that TLS stacks don't know yet), nodes go on reaching the authority.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from csi_driver.authority.ca.key_pairs import CAKeyPair, make_root
from csi_driver.authority.ca.keyring_loader import MaterialReader
from csi_driver.authority.storage import Store, serving_part
from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType

SERVING, SERVING_KEY = "serving.crt", "serving.key"
"""Its values in the store of the CA."""
_MOST_CONFLICTS = 10
_HINT = "put the right value back, or remove serving.crt and serving.key to have new ones made"


def make_serving_root(now: datetime) -> CAKeyPair:
    """EC P-256, self-signed, ten years; the name says what it is to whoever finds it in a trust store."""
    return make_root("authority", generate_key(KeyType.EC_P256), now, path_length=0)


def dump_serving_root(root: CAKeyPair) -> Mapping[str, Secret[bytes]]:
    """The values for a store, PEM; :func:`load_serving_root` reads them back."""
    return {SERVING: Secret(encode_certificates([root.certificate])), SERVING_KEY: encode_key(root.key)}


def load_serving_root(values: Mapping[str, Secret[bytes]], now: datetime, *, where: str) -> CAKeyPair | None:
    """Takes the values of a store, which ``where`` names in errors; None where neither value is there.

    Raises:
        CertmountError: InvalidCA, with one fault for everything that is wrong.
    """
    reader = MaterialReader(values, f"{where} ", _HINT)
    if not reader.has(SERVING) and not reader.has(SERVING_KEY):
        return None
    certificates, key = reader.certificates(SERVING), reader.key(SERVING_KEY, None)
    if len(certificates) > 1:
        reader.fault(SERVING, f"holds {len(certificates)} certificates; expected is one")
    reader.check_self_signed(SERVING, certificates)
    reader.check_fit(SERVING_KEY, key, certificates, SERVING)
    for certificate in certificates:
        reader.check_validity(SERVING, certificate, now)
    if reader.faults or key is None:
        raise CertmountError(Reason.INVALID_CA, *reader.faults)
    return CAKeyPair(certificates[0], key.key)


async def current_serving_root(store: Store, now: datetime) -> CAKeyPair:
    """The root in the store, shared by all replicas; made where there is none.

    Raises:
        CertmountError: InvalidCA for values that can't be used, or what the store raises.
    """
    part = serving_part(store)
    for _ in range(_MOST_CONFLICTS):
        stored = await part.load()
        if root := load_serving_root(stored.values, now, where=store.name):
            return root
        made = make_serving_root(now)
        if await part.save(dump_serving_root(made), stored):
            return made
    raise CertmountError(Reason.ISSUER_UNAVAILABLE, f"{store.name}: other writers came first again and again")
