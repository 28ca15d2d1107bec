"""TSIG keys as administrators write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.issuers.acme.tsig import ALGORITHMS, TsigKey
from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret


def parse(text: str) -> TsigKey:
    return TsigKey.parse(Secret(text), "file /tsig")


@pytest.mark.parametrize(
    "text, algorithm",
    [
        ("update.example.com:c2VjcmV0", "hmac-sha256"),
        ("hmac-sha512:update.example.com:c2VjcmV0", "hmac-sha512"),
        ("HMAC-SHA1:update.example.com:c2VjcmV0\n", "hmac-sha1"),
    ],
)
def test_the_written_form(text: str, algorithm: str) -> None:
    """``[hmac:]name:key`` as nsupdate takes it, the algorithm in any case, with the end of a file's line."""
    key = parse(text)
    assert (key.name, key.secret.reveal(), key.algorithm) == ("update.example.com", b"secret", algorithm)
    assert key.for_wire().algorithm == ALGORITHMS[algorithm]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("c2VjcmV0", "is not of the form"),
        ("a:b:c:d", "is not of the form"),
        ("hmac-md5:name:c2VjcmV0", "has an algorithm that is none of hmac-sha1, "),
        ("name:not base64!", "has a key that is not base64"),
        (":c2VjcmV0", "has"),
        ("name:\x80", "has a key that is not base64"),
        ("name:", "has an empty name or key"),
        (f"{'a' * 64}:c2VjcmV0", "has a key name that is no DNS name"),
    ],
)
def test_a_malformed_key(text: str, problem: str) -> None:
    """What is wrong is said, with where the key is kept, and how to write one."""
    with pytest.raises(CertmountError, match=problem) as refusal:
        parse(text)
    assert "file /tsig" in str(refusal.value)


@given(st.text())
def test_no_text_crashes_or_shows(text: str) -> None:
    """Any text is a key or refused, and no refusal quotes it."""
    secret = "s3cr3tS3cr3t"
    try:
        key = parse(text + secret)
    except CertmountError as refusal:
        assert secret not in str(refusal)
    else:
        assert secret not in repr(key)
