"""What must be there before the first act: the cluster's keys and tokens, a policy, and the two programs with their options."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from csi_driver import NODE_AUDIENCE
from csi_driver.cli.demo.kubelet import Kubelet
from csi_driver.cli.demo.programs import Program, free_ports
from csi_driver.cli.demo.tokens import ISSUER, Pod, TokenIssuer
from csi_driver.core.identity import ServiceAccount

NODE = "demo-node"
ALLOWED = "{service_account}.{namespace}.svc.{cluster_domain}"
_POLICY = f"""\
policy:
- match: {{namespaces: ["*"], serviceAccounts: ["*"]}}
  allow: {{dns: ["{ALLOWED}"]}}
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """The players; neither program runs yet."""

    kubelet: Kubelet
    authority: Program
    node: Program
    address: str
    """Where the authority will serve."""


def set_stage(folder: Path) -> Stage:
    """Writes what the programs read into an empty folder."""
    tokens = TokenIssuer()
    port, authority_http, node_http = free_ports(3)
    policy, key_set, node_token, ca = (folder / name for name in ("policy.yaml", "jwks.json", "node-token", "ca"))
    driver = Pod.make(ServiceAccount("certmount", "certmount-node"), "certmount-node-demo", NODE)
    _write(policy, _POLICY)
    _write(key_set, tokens.key_set())
    _write(node_token, tokens.issue(driver, NODE_AUDIENCE).reveal())
    authority = [
        f"--listen=127.0.0.1:{port}",
        f"--http=127.0.0.1:{authority_http}",
        "--serving-name=localhost",
        f"--policy={policy}",
        f"--ca-dir={ca}",
        f"--jwks={key_set}",
        f"--token-issuer={ISSUER}",
    ]
    address = f"localhost:{port}"
    kubelet = Kubelet(folder / "kubelet", tokens)
    node = [
        f"--kubelet-dir={kubelet.root}",
        f"--node-name={NODE}",
        f"--authority={address}",
        f"--authority-root={ca / 'authority.crt'}",
        f"--token={node_token}",
        f"--http=127.0.0.1:{node_http}",
        "--mounts=folder",
    ]
    return Stage(
        kubelet,
        Program("authority", authority, folder, authority_http),
        Program("node", node, folder, node_http),
        address,
    )


def _write(path: Path, text: str) -> None:
    with open(path, "x", encoding="ascii", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
