"""An attacker's pod: calls the authority without a node driver, with its own tokens for certmount's audiences.

Prints the reason of the error, or OK, for each call.
"""

import json
from pathlib import Path
from typing import Any

import grpc

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.names import Names
from csi_driver.core.spec import KeyType
from csi_driver.rpc.errors import REASON_KEY

Metadata = tuple[tuple[str, str], ...]


def read(path: str) -> str:
    return Path(path).read_text(encoding="ascii").strip()


def issue(stub: Any, metadata: Metadata) -> None:
    csr = build_csr(generate_key(KeyType.EC_P256), Names())
    stub.Issue(authority_pb2.IssueRequest(csr=csr, pod_token=read("/tokens/pod")), metadata=metadata, timeout=20)


def watch_trust(stub: Any, metadata: Metadata) -> None:
    next(stub.WatchTrust(authority_pb2.WatchTrustRequest(), metadata=metadata, timeout=20))


def reason_of(method: Any, stub: Any, metadata: Metadata) -> str:
    try:
        method(stub, metadata)
    except grpc.RpcError as error:
        reasons = [item.value for item in error.trailing_metadata() or () if item.key == REASON_KEY]
        return str(reasons[0]) if reasons else error.code().name
    return "OK"


credentials = grpc.ssl_channel_credentials(read("/scripts/authority.crt").encode())
tokens: dict[str, Metadata] = {
    "no token": (),
    "pod token": (("authorization", f"Bearer {read('/tokens/pod')}"),),
    "own node token": (("authorization", f"Bearer {read('/tokens/node')}"),),
}
with grpc.secure_channel("certmount-authority.certmount.svc:443", credentials) as channel:
    authority = authority_pb2_grpc.AuthorityStub(channel)
    reasons = {
        f"{method.__name__} with {token}": reason_of(method, authority, metadata)
        for token, metadata in tokens.items()
        for method in (issue, watch_trust)
    }
print(json.dumps(reasons))
