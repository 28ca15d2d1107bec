"""The text formats of TSIG keys and of EAB keys."""

from __future__ import annotations

import base64

import dns.tsig
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.issuers.acme.tsig_key import TsigKey
from csi_driver.authority.issuers.key_encoding import decode_base64, is_encoded_twice, is_hexadecimal
from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret

FORMAT = "use the format of nsupdate -y, hmac-sha256:name:base64, or the key file that tsig-keygen writes"
ALGORITHMS = "expected one of hmac-sha1, hmac-sha224, hmac-sha256, hmac-sha384, hmac-sha512"
PRINTED = "use the base64 text that tsig-keygen prints"
KEY_FILE = 'key "certmount" {\n\talgorithm hmac-sha512;\n\tsecret "c2VjcmV0";\n};\n'


def parse(text: str) -> TsigKey:
    return TsigKey.parse(Secret(text), "file /tsig")


@pytest.mark.parametrize(
    "text, algorithm",
    [
        ("update.example.com:c2VjcmV0", "hmac-sha256"),
        ("update.example.com.:c2VjcmV0", "hmac-sha256"),
        ("hmac-sha512:update.example.com:c2VjcmV0", "hmac-sha512"),
        ("HMAC-SHA1:update.example.com:c2VjcmV0\n", "hmac-sha1"),
        ("hmac-sha384.:update.example.com.:c2VjcmV0", "hmac-sha384"),
        ("HMAC_SHA224:update.example.com:c2VjcmV0", "hmac-sha224"),
        ("hmac-sha-256:update.example.com:c2VjcmV0", "hmac-sha256"),
        ("sha512:update.example.com:c2VjcmV0", "hmac-sha512"),
        (KEY_FILE.replace("certmount", "update.example.com"), "hmac-sha512"),
        ("# a comment\nkey update.example.com. { secret c2VjcmV0; algorithm HMAC-SHA256; }; // end", "hmac-sha256"),
    ],
)
def test_formats_of_nsupdate_are_parsed(text: str, algorithm: str) -> None:
    """``[hmac:]name:key`` or a key file, with the algorithm in any spelling, a final dot, and a trailing line feed."""
    key = parse(text)
    assert (key.name, key.secret.reveal(), key.algorithm) == ("update.example.com", b"secret", algorithm)
    assert key.for_dnspython().algorithm == getattr(dns.tsig, algorithm.upper().replace("-", "_"))


TWICE = "is encoded twice with base64; store the decoded text: `kubectl create secret` encodes it itself"
MD5 = f"has the algorithm hmac-md5, which is not secure; {ALGORITHMS}; create a new key with tsig-keygen"
HEXADECIMAL = "has a key in hexadecimal; expected base64; convert it with `xxd -r -p | base64`"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("c2VjcmV0", f"does not have the format [hmac:]name:key; {FORMAT}"),
        ("a:b:c:d", f"does not have the format [hmac:]name:key; {FORMAT}"),
        ("hmac-sha3:name:c2VjcmV0", f"has an unsupported algorithm; {ALGORITHMS}; {FORMAT}"),
        ("hmac-md5:name:c2VjcmV0", MD5),
        ("HMAC-MD5.SIG-ALG.REG.INT:name:c2VjcmV0", MD5),
        ("name:hmac-sha256:c2VjcmV0", f"has the name before the algorithm; {FORMAT}"),
        ("name c2VjcmV0", f"has spaces in place of colons; {FORMAT}"),
        ("name:not base64!", f"has a key that is not base64; {PRINTED}"),
        ("name:\x80", f"has a key that is not base64; {PRINTED}"),
        ("name:/etc/bind/tsig.key", f"has the path of a file in place of the key; {PRINTED}"),
        ("name:" + "0123456789abcdef" * 2, HEXADECIMAL),
        ("name:", f"has an empty key; {PRINTED}"),
        (":c2VjcmV0", f"has an empty key name; {FORMAT}"),
        (".:c2VjcmV0", f"has an empty key name; {FORMAT}"),
        (f"{'a' * 64}:c2VjcmV0", f"has a key name that is not a DNS name; {FORMAT}"),
        ("/etc/bind/tsig.key", f"is the path of a file, not its content; {FORMAT}"),
        ("Private-key-format: v1.3\nKey: c2VjcmV0", f"is a key file of dnssec-keygen; {FORMAT}"),
        ("key:\n  - id: name\n    algorithm: hmac-sha256", f"is a configuration of Knot DNS; {FORMAT}"),
        ('{"key": "c2VjcmV0"}', f"looks like JSON; {FORMAT}"),
        (KEY_FILE + KEY_FILE, "is a BIND configuration with more than one key; store only one key statement"),
        (
            KEY_FILE + "options {};",
            "is a BIND configuration with statements other than a key; store only one key statement",
        ),
        (
            f"name:{base64.b64encode(base64.b64encode(b'0123456789abcdef')).decode()}",
            f"has a key that is encoded twice with base64; {PRINTED}",
        ),
        ('key "name" { algorithm hmac-sha256; };', f"is a BIND key file without secret; {FORMAT}"),
        (base64.b64encode(KEY_FILE.encode()).decode(), TWICE),
        (base64.b64encode(b"hmac-sha256:name:c2VjcmV0").decode(), TWICE),
        ("name:" * 1000, f"has 5000 characters; expected at most 4096; {FORMAT}"),
    ],
)
def test_malformed_key_is_explained(text: str, problem: str) -> None:
    with pytest.raises(CertmountError) as failure:
        parse(text)
    assert str(failure.value) == f"IssuerUnavailable: file /tsig: {problem}"


@given(st.text())
def test_no_error_contains_the_key(text: str) -> None:
    secret = "s3cr3tS3cr3t"
    try:
        key = parse(text + secret)
    except CertmountError as error:
        assert secret not in str(error)
    else:
        assert secret not in repr(key)


KEY = bytes(range(100, 132))


@pytest.mark.parametrize(
    "text",
    [
        base64.urlsafe_b64encode(KEY).decode().rstrip("="),
        base64.urlsafe_b64encode(KEY).decode(),
        base64.b64encode(KEY).decode(),
        "\n".join(base64.b64encode(KEY).decode().partition("g")) + "\n",
    ],
    ids=["base64url", "padded", "base64", "several lines"],
)
def test_every_form_of_base64_is_decoded(text: str) -> None:
    assert decode_base64(text) == KEY


def test_encodings_that_were_not_meant_are_recognized() -> None:
    assert is_hexadecimal(KEY.hex())
    assert not is_hexadecimal(base64.b64encode(KEY).decode())
    assert is_encoded_twice(base64.b64encode(KEY))
    assert is_encoded_twice(base64.urlsafe_b64encode(KEY).rstrip(b"="))
    assert not is_encoded_twice(KEY)
    assert not is_encoded_twice(b"secret")
