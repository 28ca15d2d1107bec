"""``certmount policy``: documented sessions, exit statuses and faults."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from csi_driver.authority.policy.policy_file import read_policy
from csi_driver.cli.main import main
from tests.support.json_schema import valid
from tests.unit.core.policy.test_schema import SCHEMA

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "policy.md"
POLICY, SECRETS, _KUSTOMIZATION, FAULTY, BROAD, CASES = re.findall(
    r"```yaml\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL
)
SESSIONS: list[tuple[str, str]] = [
    (command, output)
    for block in re.findall(r"```console\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    for command, output in re.findall(r"^\$ certmount ([^\n]*)\n((?:(?!\$ ).*\n)*)", block, flags=re.MULTILINE)
]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "secrets.yaml").write_text(SECRETS)
    (tmp_path / "faulty.yaml").write_text(FAULTY)
    (tmp_path / "broad.yaml").write_text(BROAD)
    (tmp_path / "cases.yaml").write_text(CASES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> Result:
    result = CliRunner().invoke(main, shlex.split(line))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.mark.parametrize("command, output", SESSIONS, ids=[command for command, _ in SESSIONS])
def test_documented_commands_print_the_documented_output(command: str, output: str) -> None:
    assert run(command).output == output


def test_policy_examples_are_valid() -> None:
    assert read_policy(POLICY.encode(), trust_domain="cluster.local", cluster_domain="cluster.local").rules
    assert valid(SCHEMA, yaml.safe_load(POLICY))
    assert valid(SCHEMA, yaml.safe_load(SECRETS))
    assert not valid(SCHEMA, yaml.safe_load(FAULTY))
    (config_map,) = yaml.safe_load_all((ROOT / "deploy/base/policy.yaml").read_text())
    shipped = config_map["data"]["policy.yaml"]
    assert read_policy(shipped.encode(), trust_domain="a.b", cluster_domain="c.d").rules == ()
    example = "\n".join(line.removeprefix("# ") for line in shipped.splitlines()[2:])
    assert len(read_policy(example.encode(), trust_domain="a.b", cluster_domain="c.d").rules) == 1


@pytest.mark.parametrize(
    "line, status",
    [
        ("policy check policy.yaml", 0),
        ("policy check faulty.yaml", 1),
        ("policy check missing.yaml", 2),
        ("policy explain --file policy.yaml --namespace web", 0),
        ("policy explain --file policy.yaml --namespace web --name x.example.org", 1),
        ("policy explain --file policy.yaml --namespace web --service-account old-edge", 1),
        ("policy explain --file faulty.yaml --namespace web", 2),
        ("policy explain --file missing.yaml --namespace web", 2),
        ("policy explain --file . --namespace web", 2),
        ("policy explain --file policy.yaml", 2),
        ("policy explain --file policy.yaml --namespace Web", 2),
        ("policy explain --file policy.yaml --namespace web --name 10.0.0.1", 2),
        ("policy explain --file policy.yaml --namespace web --namespace-label team", 2),
        ("policy explain --file secrets.yaml --namespace shop --secret shop-tls --name shop.example.com", 0),
        ("policy explain --file secrets.yaml --namespace shop --secret shop-tls", 1),
        ("policy explain --file secrets.yaml --namespace shop --service-account shop-tls --name shop.example.com", 1),
        ("policy explain --file secrets.yaml --namespace shop --secret Shop", 2),
        ("policy test cases.yaml", 1),
        ("policy test missing.yaml", 2),
        ("policy test policy.yaml", 2),
    ],
)
def test_exit_status_shows_the_result(line: str, status: int) -> None:
    """0: allowed, 1: not allowed, 2: the question cannot be answered. No output has a traceback."""
    result = run(line)
    assert result.exit_code == status
    assert result.output
    assert "Traceback" not in result.output


TEAM = "--namespace-label team=payments"


@pytest.mark.parametrize(
    "options, expected",
    [
        (f"--service-account teller {TEAM} --ip 10.20.1.7", "allowed      10.20.1.7"),
        ("--service-account teller --ip 10.20.1.7", "other rules: policy[0] (line 3), policy[1] (line 10)"),
        (f"{TEAM} --ip 10.21.0.1", "not allowed  10.21.0.1"),
        (f"--service-account teller {TEAM} --email teller@pay.example.com", "allowed      teller@pay.example.com"),
        (
            f"{TEAM} --pod p-0 --service s --name p-0.s.bank.svc",
            "allowed      p-0.s.bank.svc                             by policy[1] (line 10)",
        ),
        (
            "--pod p-0 --governing-service s --name p-0.s.bank.svc",
            "allowed      p-0.s.bank.svc                             by built-in",
        ),
        (
            f"{TEAM} --issuer step-ca --key-type rsa-2048",
            "policy[1] (line 10) allows it only with key-type EC-P256 or ML-DSA-65, not RSA-2048",
        ),
        (f"{TEAM} --issuer step-ca --duration 1h --usage client", "allowed with duration 1h and usages client"),
        ("--trust-domain prod.example --uri spiffe://prod.example/ns/bank/sa/default", "by built-in"),
        ("--cluster-domain k8s.example --service s", "allowed      s.bank.svc.k8s.example "),
    ],
)
def test_explain_has_an_option_for_everything_that_a_rule_can_limit(options: str, expected: str) -> None:
    assert expected in run(f"policy explain --file policy.yaml --namespace bank {options}").output


def test_explain_shows_the_limits_of_incompatible_names(directory: Path) -> None:
    rule = "- match: {{namespaces: ['*'], serviceAccounts: ['*']}}\n  allow: {{dns: [{}], {}}}\n"
    rules = rule.format("a.example", "max_duration: 1h") + rule.format("b.example", "min_duration: 2h")
    (directory / "policy.yaml").write_text("policy:\n" + rules)
    result = run("policy explain --file policy.yaml --namespace web --name a.example --name b.example")
    assert result.exit_code == 1
    assert "not allowed  a.example  together with the other names" in result.output
    assert "policy[0] (line 2) allows it only with usages server, client and duration 10s to 1h" in result.output
    assert "policy[1] (line 4) allows it only with usages server, client and duration 2h to 24h" in result.output


TABLE = "policy: policy.yaml\ncases:\n"
WEB = "- {pod: {namespace: web}, "


@pytest.mark.parametrize(
    "cases, words",
    [
        (WEB + "expect: maybe}\n", "cases[0].expect (line 3): 'maybe' is not a result; use allowed or not allowed"),
        ("- {pod: {namespace: web}}\n", "cases[0].expect (line 3): is missing"),
        ("- {expect: allowed}\n", "cases[0].pod (line 3): is missing"),
        (
            "- {pod: {namespace: w}, secret: {namespace: w, name: s}, expect: allowed}\n",
            "cases[0].secret (line 3): cannot be used with pod",
        ),
        ("- {secret: {namespace: w}, expect: allowed}\n", "cases[0].secret.name (line 3): is missing"),
        (
            "- {secret: {namespace: w, name: s}, request: {spiffe: 'false'}, expect: allowed}\n",
            "cases[0].request.spiffe (line 3): is unknown",
        ),
        (
            "- {secret: {namespace: w, name: s}, request: {acme-email: x}, expect: allowed}\n",
            "cases[0].request.acme-email (line 3): 'x' is not an email address",
        ),
        ("- {pod: {}, expect: allowed}\n", "cases[0].pod.namespace (line 3): is missing"),
        ("- {pod: {namespace: W}, expect: allowed}\n", "cases[0].pod.namespace (line 3): 'W' is not a name"),
        ("- {pod: {namespace: w, serviceAcount: x}, expect: allowed}\n", "did you mean serviceAccount?"),
        ("- {pod: {namespace: w, services: [A]}, expect: allowed}\n", "cases[0].pod.services[0] (line 3): 'A' is not"),
        ("- {pod: {namespace: w, namespaceLabels: [a]}, expect: allowed}\n", "is not a mapping of strings"),
        (
            "- pod: {namespace: w}\n  request:\n    name: A B\n    nmae: x\n  expect: allowed\n",
            "cases[0].request.name (line 5): 'A B' has the label",
        ),
        (WEB + "request: {fs-group: 5}, expect: allowed}\n", '5 is a number in YAML, not a string; write "5"'),
        (WEB + "request: {nmae: x}, expect: allowed}\n", "cases[0].request.nmae (line 3): is unknown; did"),
        ("- 7\n", "cases[0] (line 3): is not a mapping"),
        ("  []\n", "cases (line 2): is empty; add at least one case"),
        ("- ]", "line 3: the line does not fit the lines above"),
    ],
)
def test_invalid_table_is_rejected_with_line(directory: Path, cases: str, words: str) -> None:
    (directory / "cases.yaml").write_text(TABLE + cases)
    result = run("policy test cases.yaml")
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    "case, words",
    [
        ("{pod: {namespace: web, serviceAccount: edge}, request: {name: a.example.com}, expect: not allowed}", "expected not allowed, but is allowed: by policy[0] (line 3) and built-in"),
        ("{pod: {namespace: web, serviceAccount: edge}, request: {name: a.example.com}, expect: allowed, rule: 'policy[1]'}", "is allowed as expected, but by policy[0] and built-in instead of policy[1]"),
        ("{pod: {namespace: web}, request: {name: a.example.com}, expect: not allowed, rule: 'deny[0]'}", "is not allowed as expected, but by no rule instead of deny[0]"),
        ("{pod: {namespace: web, serviceAccount: old-edge}, expect: allowed}", "service account web/old-edge: is denied: its token was in a log on 3 May"),
    ],
)  # fmt: skip
def test_failed_case_is_explained(directory: Path, case: str, words: str) -> None:
    (directory / "cases.yaml").write_text(TABLE + f"- {case}\n")
    result = run("policy test cases.yaml")
    assert result.exit_code == 1
    assert words in result.output
    assert "1 case, 1 failed" in result.output


def test_table_can_contain_secrets(directory: Path) -> None:
    secret = "secret: {namespace: shop, name: shop-tls}"
    request = "name: shop.example.com, issuer: letsencrypt"
    cases = [
        f"{{{secret}, request: {{{request}, acme-email: a@shop.example.com}}, expect: allowed, rule: 'policy[0]'}}",
        f"{{{secret}, request: {{{request}, acme-email: a@example.com}}, expect: not allowed}}",
        "{secret: {namespace: shop, name: edge-old}, request: {name: shop.example.com}, expect: not allowed, rule: 'deny[0]'}",
        "{pod: {namespace: shop, serviceAccount: shop-tls}, request: {name: shop.example.com}, expect: not allowed}",
        f"{{{secret}, request: {{name: x.example.org}}, expect: allowed}}",
    ]
    (directory / "cases.yaml").write_text("policy: secrets.yaml\ncases:\n" + "".join(f"- {case}\n" for case in cases))
    result = run("policy test cases.yaml")
    assert "5 cases, 1 failed" in result.output
    assert (
        "FAILED cases[4] (line 7): secret shop/shop-tls with x.example.org: expected allowed, but is not"
        in result.output
    )


def test_table_sets_its_domains_and_its_policy_path_is_relative_to_it(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = "- {pod: {namespace: w, services: [s]}, request: {name: s.w.svc.k.example, uri-sans: 'spiffe://t.example/ns/w/sa/default'}, expect: allowed}\n"
    (directory / "cases.yaml").write_text("trust_domain: t.example\ncluster_domain: k.example\n" + TABLE + case)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    result = run(f"policy test {directory / 'cases.yaml'}")
    assert (result.exit_code, "1 case, 0 failed" in result.output) == (0, True)


def test_default_file_is_the_authoritys_policy() -> None:
    """The path is that of the manifest, so ``kubectl exec deploy/certmount-authority`` needs no option."""
    manifest = (ROOT / "deploy/base/authority.yaml").read_text()
    assert "--policy=/etc/certmount/policy/policy.yaml" in manifest
    assert "/etc/certmount/policy/policy.yaml: cannot be read" in run("policy explain --namespace web").output
    assert "/etc/certmount/policy/policy.yaml: cannot be read" in run("policy check").output
