"""TSIG keys (RFC 8945) in the formats of ``nsupdate -y`` and ``nsupdate -k``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

import dns.exception
import dns.name
import dns.tsig

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.issuers.key_encoding import decode_base64, is_encoded_twice, is_hexadecimal
from csi_driver.core.config.issuers import CredentialSource
from csi_driver.core.secret import Secret

TSIG_ALGORITHMS = ("hmac-sha1", "hmac-sha224", "hmac-sha256", "hmac-sha384", "hmac-sha512")  # RFC 8945, without MD5
_DEFAULT_ALGORITHM = "hmac-sha256"
_FORMAT = "use the format of nsupdate -y, hmac-sha256:name:base64, or the key file that tsig-keygen writes"
_MAX_TEXT = 4096
_MIN_KEY = 22  # Characters of base64 for the 128 bits that RFC 8945 section 8 asks for
_COMMENT = re.compile(r"(?://|#)[^\n]*+|/\*(?:[^*]|\*(?!/))*+\*/")
_KEY_FILE = re.compile(r'key\s+"?(?P<name>[^\s"{};]+)"?\s*\{(?P<statements>[^{}]*)\}\s*;?', re.ASCII)
_STATEMENT = re.compile(r'\s*(?P<name>algorithm|secret)\s+"?(?P<value>[^\s";]+)"?\s*;', re.ASCII)
_ALGORITHM_WORD = re.compile(r"(?:hmac)?(?P<hash>md5|sha1|sha224|sha256|sha384|sha512)", re.ASCII)
_OTHER_FORMATS = (
    ("Private-key-format:", "is a key file of dnssec-keygen"),
    ("{", "looks like JSON"),
    ("/", "is the path of a file, not its content"),
    ("key:", "is a configuration of Knot DNS"),
)


@dataclass(frozen=True, slots=True)
class TsigKey:
    """A secret shared with a DNS server (RFC 8945)."""

    name: str
    secret: Secret[bytes]
    algorithm: str = _DEFAULT_ALGORITHM

    @classmethod
    def parse(cls, text: Secret[str], field: str) -> Self:
        """Parse a key; raise CertmountError IssuerUnavailable, which names ``field`` and shows no content.

        Names with a final dot and other spellings of algorithms, such as ``HMAC_SHA256``, are accepted.
        """
        try:
            algorithm, name, key = _split(text.reveal().strip())
            return cls(_parse_name(name), Secret(_parse_secret(key)), _parse_algorithm(algorithm))
        except _Malformed as malformed:
            raise issuer_unavailable(field, malformed.problem, malformed.hint) from None

    @classmethod
    async def read(cls, source: CredentialSource | None, credentials: CredentialReader) -> Self | None:
        return None if source is None else cls.parse(await credentials.read_text(source), f"dns01.tsig: {source}")

    def for_dnspython(self) -> dns.tsig.Key:
        return dns.tsig.Key(self.name, self.secret.reveal(), self.algorithm)


class _Malformed(Exception):
    def __init__(self, problem: str, hint: str = _FORMAT) -> None:
        super().__init__(problem)
        self.problem, self.hint = problem, hint


def _split(text: str) -> tuple[str, str, str]:
    """Return algorithm, name and secret."""
    if len(text) > _MAX_TEXT:
        raise _Malformed(f"has {len(text)} characters; expected at most {_MAX_TEXT}")
    if re.search(r"\bkey\s+[^\s:]+\s*\{", text, re.ASCII):
        return _split_key_file(_COMMENT.sub("", text))
    for start, problem in _OTHER_FORMATS:
        if text.startswith(start):
            raise _Malformed(problem)
    parts = text.split(":")
    if len(parts) == 3:
        if _ALGORITHM_WORD.fullmatch(_letters(parts[1])) and not _ALGORITHM_WORD.fullmatch(_letters(parts[0])):
            raise _Malformed("has the name before the algorithm")
        return parts[0], parts[1], parts[2]
    if len(parts) == 2:
        return _DEFAULT_ALGORITHM, parts[0], parts[1]
    if len(parts) == 1 and _decodes_to_key(text):
        raise _Malformed(
            "is encoded twice with base64", "store the decoded text: `kubectl create secret` encodes it itself"
        )
    if len(parts) == 1 and " " in text:
        raise _Malformed("has spaces in place of colons")
    raise _Malformed("does not have the format [hmac:]name:key")


def _decodes_to_key(text: str) -> bool:
    try:
        decoded = decode_base64(text)
    except ValueError:
        return False
    return b":" in decoded or b"{" in decoded or is_encoded_twice(decoded)


def _split_key_file(text: str) -> tuple[str, str, str]:
    keys = list(_KEY_FILE.finditer(text))
    if len(keys) != 1 or _KEY_FILE.sub("", text).strip():
        what = "more than one key" if len(keys) > 1 else "statements other than a key"
        raise _Malformed(f"is a BIND configuration with {what}", "store only one key statement")
    statements = {one["name"]: one["value"] for one in _STATEMENT.finditer(keys[0]["statements"])}
    if missing := {"algorithm", "secret"} - statements.keys():
        raise _Malformed(f"is a BIND key file without {' and '.join(sorted(missing))}")
    return statements["algorithm"], keys[0]["name"], statements["secret"]


def _parse_algorithm(text: str) -> str:
    match = _ALGORITHM_WORD.fullmatch(_letters(text.removesuffix(".")))
    algorithm = f"hmac-{match['hash']}" if match else ""
    if algorithm in TSIG_ALGORITHMS:
        return algorithm
    expected = "expected one of " + ", ".join(TSIG_ALGORITHMS)
    if algorithm or _letters(text).startswith("hmacmd5"):
        raise _Malformed(
            f"has the algorithm hmac-md5, which is not secure; {expected}", "create a new key with tsig-keygen"
        )
    raise _Malformed(f"has an unsupported algorithm; {expected}")


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower(), flags=re.ASCII)


def _parse_name(text: str) -> str:
    try:
        name = dns.name.from_text(text).to_text(omit_final_dot=True) if text else ""
    except (dns.exception.DNSException, UnicodeError):
        raise _Malformed("has a key name that is not a DNS name") from None
    if name in ("", "."):
        raise _Malformed("has an empty key name")
    return name


def _parse_secret(text: str) -> bytes:
    hint = "use the base64 text that tsig-keygen prints"
    if not text:
        raise _Malformed("has an empty key", hint)
    if text.startswith("/") and len(text) < _MIN_KEY:
        raise _Malformed("has the path of a file in place of the key", hint)
    if is_hexadecimal(text):
        raise _Malformed("has a key in hexadecimal; expected base64", "convert it with `xxd -r -p | base64`")
    try:
        secret = decode_base64(text)
    except ValueError:  # including binascii.Error
        raise _Malformed("has a key that is not base64", hint) from None
    if is_encoded_twice(secret):
        raise _Malformed("has a key that is encoded twice with base64", hint)
    return secret
