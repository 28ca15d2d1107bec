"""Options of ``certmount secrets run``."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from csi_driver.cli.secrets import command


def test_more_namespaces_than_connections_are_refused() -> None:
    """Otherwise some of them would never be watched."""
    namespaces = " ".join(f"ns-{number}" for number in range(46))
    environment = {"CERTMOUNT_SECRETS_NAMESPACES": namespaces, "CERTMOUNT_SECRETS_GATEWAYS": "true"}
    result = CliRunner(env=environment).invoke(command, ["run"])
    assert result.exit_code == 2
    assert result.output.endswith(
        "Error: --namespace, --list: need 92 watches; the maximum is 90; use several controllers, each with its own "
        "namespaces and Lease\n"
    )


MANIFEST = """apiVersion: v1
kind: ConfigMap
metadata: {name: certificates, namespace: shop}
data:
  certificates: |
    - secret: edge-tls
      domains: [shop.example.com]
"""


@pytest.mark.parametrize(
    "content, options, secret",
    [
        (MANIFEST, [], "shop/edge-tls"),
        (MANIFEST, ["--namespace", "shop"], "shop/edge-tls"),
        (MANIFEST.replace(", namespace: shop", ""), [], "default/edge-tls"),
        (MANIFEST.replace(", namespace: shop", ""), ["--namespace", "web"], "web/edge-tls"),
        ("- secret: edge-tls\n  domains: [shop.example.com]\n", ["--namespace", "web"], "web/edge-tls"),
        ("- secret: edge-tls\n  domains: [shop.example.com]\n", [], "default/edge-tls"),
    ],
)
def test_list_is_in_the_namespace_of_its_manifest(
    content: str, options: list[str], secret: str, tmp_path: Path
) -> None:
    (tmp_path / "list.yaml").write_text(content)
    result = CliRunner().invoke(command, ["check", str(tmp_path / "list.yaml"), *options])
    assert result.output == f"Secret {secret}: names shop.example.com; issuer internal\n"


def test_another_namespace_than_that_of_the_manifest_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "list.yaml").write_text(MANIFEST)
    result = CliRunner().invoke(command, ["check", str(file), "--namespace", "web"])
    assert result.exit_code == 2
    problem = f"--namespace: is web, but the ConfigMap in {file} is in namespace shop; omit it"
    assert result.output.endswith(f"Error: {problem}\n")


def test_namespaces_are_required() -> None:
    result = CliRunner(env={"CERTMOUNT_SECRETS_NAMESPACES": ""}).invoke(command, ["run"])
    assert result.exit_code == 2
    assert "Missing option '--namespace'" in result.output
