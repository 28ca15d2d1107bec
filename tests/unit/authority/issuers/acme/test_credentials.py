"""The text format of TSIG keys."""

from __future__ import annotations

import dns.tsig
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.issuers.acme.nameserver import TsigKey
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
def test_text_format_of_nsupdate_is_parsed(text: str, algorithm: str) -> None:
    """``[hmac:]name:key``, with the algorithm in any case, and with a trailing line feed."""
    key = parse(text)
    assert (key.name, key.secret.reveal(), key.algorithm) == ("update.example.com", b"secret", algorithm)
    assert key.for_dnspython().algorithm == getattr(dns.tsig, algorithm.upper().replace("-", "_"))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("c2VjcmV0", "does not have the format"),
        ("a:b:c:d", "does not have the format"),
        ("hmac-md5:name:c2VjcmV0", "has an unsupported algorithm; expected one of hmac-sha1, "),
        ("name:not base64!", "has a key that is not base64"),
        (":c2VjcmV0", "has"),
        ("name:\x80", "has a key that is not base64"),
        ("name:", "has an empty name or key"),
        (f"{'a' * 64}:c2VjcmV0", "has a key name that is not a DNS name"),
    ],
)
def test_error_names_the_source_of_a_malformed_key(text: str, problem: str) -> None:
    with pytest.raises(CertmountError, match=problem) as failure:
        parse(text)
    assert "file /tsig" in str(failure.value)


@given(st.text())
def test_no_error_contains_the_key(text: str) -> None:
    secret = "s3cr3tS3cr3t"
    try:
        key = parse(text + secret)
    except CertmountError as error:
        assert secret not in str(error)
    else:
        assert secret not in repr(key)
