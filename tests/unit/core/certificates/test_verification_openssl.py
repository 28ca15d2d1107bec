"""OpenSSL accepts every chain that the driver accepts, so the pod's peers accept it too."""

from __future__ import annotations

import dataclasses
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from csi_driver.core.certificates.verification import VerifiedCertificate
from csi_driver.core.errors import CertmountError
from csi_driver.core.spec import KeyType
from tests.support.requirements import require_program
from tests.unit.core import pki
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import CA_USAGE, NOW, Signer, Validity, der, key_of
from tests.unit.core.responses import GOOD, NO_CERT_SIGN, UNKNOWN, Response, leaf

# cryptography warns about unusual certificates that it still parses.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The properties of one CA in a chain."""

    ca: bool
    path_length: int | None
    usage: x509.KeyUsage | None
    unknown: bool
    validity: Validity
    kind: KeyType

    def build(self, name: str, parent: Signer | None, number: int) -> Signer:
        extensions: list[x509.ExtensionType] = [self.usage] if self.usage else []
        return pki.authority(
            name,
            parent,
            key=key_of(self.kind, number),
            ca=self.ca,
            path_length=self.path_length if self.ca else None,
            validity=self.validity,
            extensions=[*extensions, *([UNKNOWN] if self.unknown else [])],
        )


def mostly(usual: object, *others: object) -> st.SearchStrategy[object]:
    """Return the usual value nine times out of ten, so that most chains have one fault."""
    return st.integers(0, 9).flatmap(lambda number: st.sampled_from(others) if number == 9 else st.just(usual))


shapes = st.builds(
    Shape,
    mostly(True, False),
    st.sampled_from([None, None, 0, 1, 2]),
    mostly(CA_USAGE, None, None, NO_CERT_SIGN),
    mostly(False, True),
    mostly(Validity(), Validity(end=timedelta(seconds=-2)), Validity(start=timedelta(seconds=2))),
    st.sampled_from([KeyType.EC_P256, KeyType.EC_P384, KeyType.ED25519, KeyType.RSA_2048]),
)
PLAIN = Shape(True, None, CA_USAGE, False, Validity(), KeyType.EC_P256)


def openssl_accepts(directory: Path, verified: VerifiedCertificate, now: datetime) -> bool:
    openssl = require_program("openssl")
    for name, certificates in (("roots", verified.roots), ("chain", verified.chain[1:]), ("leaf", verified.chain[:1])):
        pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
        (directory / name).write_bytes(pem)
    command = [openssl, "verify", "-attime", str(int(now.timestamp())), "-no-CApath", "-no-CAstore", "-CAfile", "roots"]
    untrusted = ["-untrusted", "chain"] if len(verified.chain) > 1 else []
    done = subprocess.run([*command, *untrusted, "leaf"], cwd=directory, capture_output=True, check=False)
    return done.returncode == 0


@settings(max_examples=2 * settings().max_examples)
@given(st.lists(shapes, min_size=1, max_size=4), st.sampled_from([(), (), (UNKNOWN,)]), st.booleans())
@example([PLAIN], (), False)
@example([PLAIN] * 3, (), True)
@example([PLAIN, dataclasses.replace(PLAIN, usage=None)], (), False)
@example([PLAIN, dataclasses.replace(PLAIN, usage=NO_CERT_SIGN)], (), False)
@example([PLAIN, dataclasses.replace(PLAIN, unknown=True)], (), False)
@example([dataclasses.replace(PLAIN, unknown=True), PLAIN], (), False)
@example([dataclasses.replace(PLAIN, path_length=1), PLAIN, PLAIN], (), False)
def test_openssl_accepts_every_accepted_chain(
    tmp_path_factory: pytest.TempPathFactory,
    line: list[Shape],
    extensions: tuple[x509.ExtensionType, ...],
    send_root: bool,
) -> None:
    signers: list[Signer] = []
    for number, shape in enumerate(line):
        signers.append(shape.build(f"authority {number}", signers[-1] if signers else None, 10 + number))
    certificates = [signer.certificate for signer in reversed(signers)]
    chain = der(leaf(signers[-1], extensions=extensions), *certificates[: None if send_root else -1])
    verified = outcome(Response(chain, der(signers[0].certificate)).check, CertmountError)
    event("accepted" if isinstance(verified, VerifiedCertificate) else "rejected")
    if isinstance(verified, VerifiedCertificate):
        assert openssl_accepts(tmp_path_factory.mktemp("pki"), verified, NOW)


@pytest.mark.parametrize("name", GOOD)
def test_openssl_accepts_valid_responses(name: str, tmp_path: Path) -> None:
    response = GOOD[name]
    assert openssl_accepts(tmp_path, response.check(), response.now)
