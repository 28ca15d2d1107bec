"""docs/secrets.md, the guides for kube-lego and notariat, and the manifests match the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from csi_driver.authority.policy.policy_file import read_policy
from csi_driver.cli.main import main
from csi_driver.cli.secrets import run
from csi_driver.core.errors import Reason
from csi_driver.kube.tls_secrets import source_objects
from csi_driver.secrets.sources.annotated import SourceRules
from csi_driver.secrets.sources.certificate_list import parse_certificate_list

ROOT = Path(__file__).parents[3]
PAGES = ("secrets.md", "from-kube-lego.md", "from-notariat.md")
EXAMPLE = ROOT / "deploy" / "overlay-example-secrets"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def documents(name: str) -> list[Any]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", page(name), flags=re.MULTILINE | re.DOTALL)
    return [one for block in blocks for one in yaml.safe_load_all(block)]


def options() -> dict[str, str]:
    """Return the options that have an environment variable."""
    return {option.opts[0]: str(option.envvar) for option in run.params if option.envvar}


def deployment() -> Any:
    manifests = yaml.safe_load_all((ROOT / "deploy/components/secrets/controller.yaml").read_text())
    return next(one for one in manifests if one["kind"] == "Deployment")


@pytest.mark.parametrize("name", ["secrets.md", "from-notariat.md"])
def test_lists_of_the_pages_are_valid(name: str) -> None:
    (config_map,) = [one for one in documents(name) if one.get("kind") == "ConfigMap"]
    namespace, content = config_map["metadata"]["namespace"], config_map["data"]["certificates"]
    rules = SourceRules(frozenset([namespace]), "letsencrypt")
    requests, faults = parse_certificate_list(content.encode(), namespace, rules)
    assert faults == ()
    assert str(requests[0].secret) == f"{namespace}/cert-example.com"
    assert [str(name) for name in requests[0].names] == ["example.com", "www.example.com"]
    assert (requests[0].options.email, requests[0].options.tsig_secret) == ("admin@example.com", f"{namespace}/tsigkey")


def test_documented_check_of_a_list_prints_the_documented_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (config_map,) = [one for one in documents("secrets.md") if one.get("kind") == "ConfigMap"]
    Path("notariat-config.yaml").write_text(yaml.safe_dump(config_map))
    found = re.search(r"^\$ certmount (secrets check .*)\n((?:Secret .*\n)+)", page("secrets.md"), flags=re.MULTILINE)
    assert found is not None
    assert CliRunner().invoke(main, shlex.split(found[1])).output == found[2]


def test_check_of_an_empty_list_says_so(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text("# all certificates are commented out\n")
    result = CliRunner().invoke(main, ["secrets", "check", str(file)])
    assert (result.exit_code, result.output) == (0, f"{file}: the list contains no certificates\n")


@pytest.mark.parametrize("name", PAGES)
def test_policies_of_the_pages_are_valid_and_allow_secrets(name: str) -> None:
    (document,) = [one for one in documents(name) if "policy" in one]
    policy = read_policy(
        yaml.safe_dump(document).encode(), trust_domain="cluster.local", cluster_domain="cluster.local"
    )
    assert [rule.match.secrets for rule in policy.rules]


def test_policy_of_the_example_is_valid() -> None:
    policy = (EXAMPLE / "policy.yaml").read_bytes()
    assert len(read_policy(policy, trust_domain="cluster.local", cluster_domain="cluster.local").rules) == 1


def test_page_lists_the_options() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `([A-Z_]+)` \|", page("secrets.md"), flags=re.MULTILINE)
    assert dict(rows) == options()


def test_page_lists_the_annotations_of_sources() -> None:
    listed = set(re.findall(r"^\| `([a-z./-]+)(?:: \"true\")?` \|", page("secrets.md"), flags=re.MULTILINE))
    assert set(source_objects.OPTIONS) - {source_objects.KUBE_LEGO_MANAGED} <= listed


def test_page_lists_the_reasons_of_secrets() -> None:
    own = {Reason.SECRET_NOT_MANAGED, Reason.INVALID_SECRET_TYPE, Reason.SECRET_ACCESS_DENIED, Reason.INVALID_SOURCE}
    listed = set(re.findall(r"^\| `([A-Z][A-Za-z]+)` \| Warning", page("secrets.md"), flags=re.MULTILINE))
    assert listed == {reason.word for reason in (*own, Reason.SHARE_EXCEEDED)}


def test_deployment_uses_existing_options() -> None:
    (container,) = deployment()["spec"]["template"]["spec"]["containers"]
    group, command, *arguments = container["args"]
    assert (group, command) == ("secrets", "run")
    known = {name for option in run.params for name in option.opts}
    assert {argument.partition("=")[0] for argument in arguments} <= known
    assert {one["name"] for one in container["env"]} <= set(options().values())
    patch = next(
        one
        for patch in yaml.safe_load((EXAMPLE / "kustomization.yaml").read_text())["patches"]
        if (one := yaml.safe_load(patch["patch"]))["kind"] == "Deployment"
    )
    (patched,) = patch["spec"]["template"]["spec"]["containers"]
    assert patched["name"] == container["name"]
    assert {one["name"] for one in patched["env"]} <= set(options().values())


def test_namespaces_of_the_example_have_the_role() -> None:
    namespace = yaml.safe_load((EXAMPLE / "shop" / "kustomization.yaml").read_text())
    assert namespace["namespace"] == "shop"
    (role,) = namespace["resources"]
    assert (EXAMPLE / "shop" / role).resolve() == ROOT / "deploy" / "components" / "secrets-namespace"
