"""Prepares the demo: keys, tokens, a policy, and the options of the two programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from csi_driver import NODE_AUDIENCE
from csi_driver.cli.demo.kubelet import DemoKubelet
from csi_driver.cli.demo.programs import Program, free_ports
from csi_driver.cli.demo.tokens import ISSUER, DemoPod, DemoTokenIssuer
from csi_driver.core.identity import ServiceAccount

NODE = "demo-node"
ALLOWED = "{service_account}.{namespace}.svc.{cluster_domain}"
_POLICY = f"""\
policy:
- match: {{namespaces: ["*"], serviceAccounts: ["*"]}}
  allow: {{dns: ["{ALLOWED}"]}}
"""


@dataclass(frozen=True, slots=True)
class DemoSetup:
    """The simulated kubelet, and the two programs before their start. The authority will listen on ``address``."""

    kubelet: DemoKubelet
    authority: Program
    node: Program
    address: str


def prepare(directory: Path) -> DemoSetup:
    """Write the files that the programs read into the empty ``directory``, which only its owner can enter."""
    tokens = DemoTokenIssuer()
    kubelet = DemoKubelet(directory / "kubelet", tokens)
    port, authority_http, node_http = free_ports(3)
    policy, key_set, node_token, ca = (directory / name for name in ("policy.yaml", "jwks.json", "node-token", "ca"))
    driver = DemoPod.create(ServiceAccount("certmount", "certmount-node"), "certmount-node-demo", NODE)
    policy.write_text(_POLICY)
    key_set.write_text(tokens.key_set())
    node_token.write_text(tokens.issue(driver, NODE_AUDIENCE).reveal())
    authority = [
        f"--listen=127.0.0.1:{port}",
        f"--http=127.0.0.1:{authority_http}",
        "--serving-name=localhost",
        f"--policy={policy}",
        f"--ca-dir={ca}",
        f"--jwks={key_set}",
        f"--token-issuer={ISSUER}",
    ]
    node = [
        f"--kubelet-dir={kubelet.root}",
        f"--node-name={NODE}",
        f"--authority=localhost:{port}",
        f"--authority-root={ca / 'authority.crt'}",
        f"--token={node_token}",
        f"--http=127.0.0.1:{node_http}",
        "--mounts=directory",
    ]
    return DemoSetup(
        kubelet,
        Program("authority", authority, directory, authority_http),
        Program("node", node, directory, node_http),
        f"localhost:{port}",
    )
