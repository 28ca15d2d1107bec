"""Parsing of the policy file, and errors with all faults."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import InvalidName, parse_dns_label, parse_object_name
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import Policy
from csi_driver.core.policy.pattern_index import PatternIndex
from csi_driver.core.policy.rules import DenyListEntry, RuleLimits, RuleMatch
from csi_driver.core.spec import KeyType, Usage
from tests.unit.core.outcomes import outcome
from tests.unit.core.strategies import hostile_texts

GOOD: dict[str, Any] = {
    "match": {
        "namespaces": ["web", "team-*"],
        "serviceAccounts": ["*"],
        "namespaceLabels": {"team": "pay*", "a.example/b": ""},
    },
    "allow": {
        "dns": ["*.{namespace}.svc.{cluster_domain}"],
        "uris": ["spiffe://{trust_domain}/ns/{namespace}/app/*"],
        "ips": ["10.0.0.0/8", "fd00::1"],
        "emails": ["{service_account}@{cluster_domain}"],
        "key_types": ["EC-P256", "ml-dsa-65"],
        "usages": ["server"],
        "min_duration": "5m",
        "max_duration": "48h",
        "issuers": ["internal", "acme"],
    },
}
MATCH = {"namespaces": ["*"], "serviceAccounts": ["*"]}


def read(document: object) -> Policy:
    return parse_policy(document, trust_domain="td.example", cluster_domain="cluster.local")


def rule(**changes: object) -> dict[str, list[Any]]:
    """Return a file with one rule; ``match_x`` and ``allow_x`` replace a key, ``match`` and ``allow`` a section."""
    parts: dict[str, Any] = {"match": dict(GOOD["match"]), "allow": dict(GOOD["allow"])}
    for key, value in changes.items():
        part, _, field = key.partition("_")
        if field:
            parts[part][field] = value
        else:
            parts[part] = value
    return {"policy": [parts]}


def faults_of(document: object) -> dict[str, str]:
    with pytest.raises(CertmountError, match=r"^InvalidPolicy: ") as raised:
        read(document)
    return {fault.field: str(fault) for fault in raised.value.faults if isinstance(fault, Fault)}


@pytest.mark.parametrize("document", [None, {}, {"policy": None}, {"policy": []}])
def test_empty_file_is_the_default_policy(document: object) -> None:
    assert read(document) == Policy("td.example", "cluster.local")


def test_rule_is_parsed_with_domains() -> None:
    (made,) = read({"policy": [GOOD]}).rules
    assert made.match == RuleMatch(("web", "team-*"), ("*",), (("team", "pay*"), ("a.example/b", "")))
    assert [str(pattern) for pattern in made.dns.patterns] == ["*.{namespace}.svc.cluster.local"]
    assert [str(pattern) for pattern in made.uris.patterns] == ["spiffe://td.example/ns/{namespace}/app/*"]
    assert [str(known) for known in made.ips.ranges] == ["10.0.0.0/8", "fd00::1"]
    assert [str(pattern) for pattern in made.emails.patterns] == ["{service_account}@cluster.local"]
    assert made.limits == RuleLimits(
        (KeyType.EC_P256, KeyType.ML_DSA_65),
        (Usage.SERVER,),
        timedelta(minutes=5),
        timedelta(hours=48),
        ("internal", "acme"),
    )
    assert made.label == "policy[0]"
    (made,) = read(rule(allow={"dns": ["a.example"]}, match={"namespaces": ["*"], "serviceAccounts": ["*"]})).rules
    assert (made.uris, made.emails) == (PatternIndex(),) * 2
    assert (made.ips.ranges, made.match.namespace_labels) == ((),) * 2
    assert made.limits == RuleLimits()


def test_deny_list_is_parsed() -> None:
    match = {"namespaces": ["web"], "serviceAccounts": ["*"]}
    assert read({"deny": [{"match": match, "reason": "key stolen on 3 May"}]}).denials == (
        DenyListEntry(RuleMatch(("web",), ("*",)), "key stolen on 3 May", "deny[0]"),
    )


FOR_SECRETS: dict[str, Any] = {
    "match": {"namespaces": ["web"], "secrets": ["edge-*"], "namespaceLabels": {"team": "pay*"}},
    "allow": {
        "dns": ["*.{namespace}.{cluster_domain}"],
        "uris": ["https://a.example/{namespace}"],
        "ips": ["10.0.0.0/8"],
        "emails": ["{namespace}@a.example"],
        "issuers": ["acme"],
        "acme_emails": ["*@a.example"],
    },
}


def for_secrets(**changes: object) -> dict[str, list[Any]]:
    allow = {**FOR_SECRETS["allow"], **changes}
    return {"policy": [{**FOR_SECRETS, "allow": allow}]}


def test_rule_for_secrets_is_parsed() -> None:
    (made,) = read({"policy": [FOR_SECRETS]}).rules
    assert made.match == RuleMatch(("web",), (), (("team", "pay*"),), ("edge-*",))
    assert [str(pattern) for pattern in made.acme_emails.patterns] == ["*@a.example"]
    assert made.limits == RuleLimits(issuers=("acme",), without_spiffe_id=True)
    assert read({"policy": [FOR_SECRETS]}).warnings == ()
    match = {"namespaces": ["web"], "secrets": ["*"]}
    (denial,) = read({"deny": [{"match": match, "reason": "key stolen"}]}).denials
    assert denial.match == RuleMatch(("web",), secrets=("*",))


_PLACEHOLDER = "which has no value for a Secret; use {namespace}, {trust_domain} or {cluster_domain}"


@pytest.mark.parametrize(
    "document, field, words",
    [
        (for_secrets(dns=["{pod}.a.example"]), "allow.dns[0]", "'{pod}.a.example' has the placeholder {pod}, " + _PLACEHOLDER),
        (for_secrets(dns=["{service}.{pod}.a"]), "allow.dns[0]", "'{service}.{pod}.a' has the placeholder {pod}, " + _PLACEHOLDER),
        (for_secrets(uris=["https://a.b/{service_account}"]), "allow.uris[0]", "'https://a.b/{service_account}' has the placeholder {service_account}, " + _PLACEHOLDER),
        (for_secrets(acme_emails=["{service}@a.b"]), "allow.acme_emails[0]", "'{service}@a.b' has the placeholder {service}, " + _PLACEHOLDER),
        (for_secrets(uris=["spiffe://{trust_domain}/*"]), "allow.uris[0]", "'spiffe://{trust_domain}/*' is a SPIFFE ID, which certificates in Secrets never contain; use a volume"),
        (for_secrets(without_spiffe_id=True), "allow.without_spiffe_id", "certificates in Secrets never contain a SPIFFE ID; remove it"),
        (for_secrets(dns=["\u201ca.example\u201d"]), "allow.dns[0]", "'\u201ca.example\u201d' has typographic quotes, which are part of the text in YAML; use \" or '"),
        (for_secrets(acme_emails=["a"]), "allow.acme_emails[0]", "'a' does not have the form name@domain"),
        (rule(allow_acme_emails=["*@a.example"]), "allow.acme_emails", "only rules for Secrets have it; remove it"),
        (rule(match_secrets=["*"]), "match.secrets", "cannot be used with serviceAccounts; use two rules"),
        (rule(match={"namespaces": ["*"]}), "match.serviceAccounts", "is missing; a rule for Secrets has secrets in its place"),
        (rule(match={"namespaces": ["*"], "secrets": ["A"]}), "match.secrets[0]", "'A' is not a name or a glob; use lower-case"),
    ],
)  # fmt: skip
def test_fault_of_a_rule_for_secrets_has_path_problem_and_hint(document: object, field: str, words: str) -> None:
    faults = faults_of(document)
    assert faults[f"policy[0].{field}"].startswith(f"policy[0].{field}: {words}")


def test_usages_are_ordered() -> None:
    assert read(rule(allow_usages=["client", "server"])).rules[0].limits.usages == (Usage.SERVER, Usage.CLIENT)


def test_rule_label_contains_the_line() -> None:
    made = parse_policy(
        {"policy": [GOOD, GOOD]},
        trust_domain="td.example",
        cluster_domain="cluster.local",
        lines={("policy",): 1, ("policy", 0): 2, ("policy", 1): 14},
    )
    assert [made_rule.label for made_rule in made.rules] == ["policy[0] (line 2)", "policy[1] (line 14)"]


@pytest.mark.parametrize(
    "document, field, words",
    [
        ("text", "policy file", "is not a mapping"),
        ([], "policy file", "is not a mapping; begin the file with one of the keys policy, deny"),
        ({"rules": []}, "rules", "is unknown; known keys: policy, deny"),
        ({"polcy": []}, "polcy", "is unknown; did you mean policy?"),
        ({1: []}, "1", "is unknown; known keys: policy, deny"),
        ({"policy": [GOOD] * 1001}, "policy", "has 1001 items; use at most 1000"),
        ({"deny": [{"match": MATCH}]}, "deny[0].reason", "is missing"),
        ({"deny": [{"match": MATCH, "reason": ""}]}, "deny[0].reason", "is not one line of 1 to 200 characters"),
        ({"deny": [{"match": MATCH, "reason": "a\nb"}]}, "deny[0].reason", "is not one line of 1 to 200 characters"),
        ({"deny": [{"match": MATCH, "reason": "x" * 201}]}, "deny[0].reason", "is not one line of 1 to 200 characters"),
        ({"deny": [{"match": MATCH, "reason": 7}]}, "deny[0].reason", "is not one line of 1 to 200 characters"),
        ({"deny": [{"reason": "x"}]}, "deny[0].match", "is missing"),
        (
            {"deny": [{"match": {**MATCH, "namespaceLabels": {}}, "reason": "x"}]},
            "deny[0].match.namespaceLabels",
            "is unknown; did you mean namespaces?",
        ),
        ({"policy": {}}, "policy", "is not a list; begin each item with '- '"),
        ({"policy": ""}, "policy", "is not a list"),
        ({"policy": 0}, "policy", "is not a list"),
        ({"policy": ["x"]}, "policy[0]", "is not a mapping; use the keys match, allow"),
    ],
)
def test_fault_has_path_problem_and_hint(document: object, field: str, words: str) -> None:
    faults = faults_of(document)
    assert list(faults) == [field]
    assert words in faults[field]


@pytest.mark.parametrize(
    "change, field, words",
    [
        (
            {"match_pods": ["x"]},
            "match.pods",
            "is unknown; known keys: namespaces, serviceAccounts, secrets, namespaceLabels",
        ),
        ({"match_namespace": ["x"]}, "match.namespace", "is unknown; did you mean namespaces?"),
        ({"match_namespaceLabels": ["x"]}, "match.namespaceLabels", "is not a mapping of labels to"),
        ({"match_namespaceLabels": {"a b": "x"}}, "match.namespaceLabels.a b", "is not a label key"),
        (
            {"match_namespaceLabels": {"a": True}},
            "match.namespaceLabels.a",
            'true is a boolean in YAML, not a string; write "true"',
        ),
        ({"match_namespaceLabels": {"a": "x y"}}, "match.namespaceLabels.a", "'x y' is not a label value"),
        (
            {"match_namespaceLabels": {f"l{number}": "x" for number in range(1001)}},
            "match.namespaceLabels",
            "has 1001 labels; use at most 1000",
        ),
        ({"allow_ips": ["10.0.0.1/8"]}, "allow.ips[0]", "use 10.0.0.0/8 for that range"),
        ({"allow_emails": ["x"]}, "allow.emails[0]", "'x' does not have the form name@domain"),
        ({"allow_usages": ["both"]}, "allow.usages[0]", "'both' is not a usage; use server, client, or both"),
        ({"allow_usages": []}, "allow.usages", "is empty, so the rule allows nothing"),
        ({"allow_usages": "server"}, "allow.usages", "is not a list"),
        ({"allow_key_types": ["RSA"]}, "allow.key_types[0]", "'RSA' is not a key type; use one of EC-P256"),
        ({"allow_issuers": ["Let's"]}, "allow.issuers[0]", "is not a name; use 1 to 63 lower-case letters"),
        ({"allow_keytypes": ["RSA"]}, "allow.keytypes", "is unknown; did you mean key_types?"),
        ({"allow_min_duration": "49h"}, "allow.min_duration", "49h is longer than max_duration, which is 48h"),
        ({"allow": {"min_duration": "25h"}}, "allow.min_duration", "longer than max_duration, which is 24h"),
        ({"allow_min_duration": "1s"}, "allow.min_duration", "'1s' is not a duration of 10s or more"),
        ({"allow_dns": ["x.example"] * 1001}, "allow.dns", "has 1001 items; use at most 1000"),
        ({"match": {"namespaces": ["*"]}}, "match.serviceAccounts", "is missing"),
        ({"match_namespaces": "web"}, "match.namespaces", "is not a list; write [web]"),
        ({"match_namespaces": "*"}, "match.namespaces", 'is not a list; write ["*"]'),
        ({"allow_dns": [{"service": None}]}, "allow.dns[0]", """'{' begins a mapping in YAML; write "{service}\""""),
        ({"allow_dns": [["a"]]}, "allow.dns[0]", "is a list, not a string"),
        ({"match_namespaces": [7]}, "match.namespaces[0]", '7 is a number in YAML, not a string; write "7"'),
        ({"match_namespaces": ["we b"]}, "match.namespaces[0]", "'we b' is not a name or a glob"),
        ({"match_namespaces": ["Web"]}, "match.namespaces[0]", "'Web' is not a name or a glob; use lower-case"),
        ({"match_namespaces": [""]}, "match.namespaces[0]", "is not a name or a glob"),
        ({"allow_hosts": ["x"]}, "allow.hosts", "is unknown; known keys: dns, uris, ips, emails"),
        ({"allow_dns": ["{sevice}.x"]}, "allow.dns[0]", "unknown placeholder {sevice}; use {namespace}"),
        ({"allow_uris": ["*://x/"]}, "allow.uris[0]", "with a literal scheme and host"),
        ({"allow_max_duration": "1d"}, "allow.max_duration", "'1d' is not a duration"),
        ({"allow_max_duration": "-1h"}, "allow.max_duration", "'-1h' is negative"),
        ({"allow_max_duration": "9s"}, "allow.max_duration", "'9s' is not a duration of 10s or more"),
        (
            {"allow_max_duration": 3600},
            "allow.max_duration",
            "'3600' is not a duration; use numbers with the units h, m or s",
        ),
    ],
)
def test_fault_of_a_rule_has_path_problem_and_hint(change: dict[str, Any], field: str, words: str) -> None:
    faults = faults_of(rule(**change))
    assert list(faults) == [f"policy[0].{field}"]
    assert words in faults[f"policy[0].{field}"]


def test_all_faults_are_reported_together() -> None:
    (first,) = rule(allow_dns=["**"], match_namespaces=["A"])["policy"]
    faults = faults_of({"policy": [first, GOOD, {"allow": {"uris": ["x"]}}, 7]})
    assert list(faults) == [
        "policy[0].match.namespaces[0]",
        "policy[0].allow.dns[0]",
        "policy[2].match",
        "policy[2].allow.uris[0]",
        "policy[3]",
    ]


def test_number_of_reported_faults_is_limited() -> None:
    with pytest.raises(CertmountError) as raised:
        read({"policy": [7] * 1000})
    assert str(raised.value).endswith("(51) and 950 more faults")


KEYS = "policy deny match allow reason namespaceLabels dns ips usages max_duration"
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), hostile_texts, st.dates()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(KEYS.split()), st.integers()), inner)
    ),
    max_leaves=8,
)


@given(
    st.one_of(
        plain,
        plain.map(lambda inner: {"policy": [inner]}),
        plain.map(lambda inner: rule(allow=inner)),
        plain.map(lambda inner: rule(match=inner)),
    )
)
def test_any_data_is_a_policy_or_invalid_policy(document: object) -> None:
    result = outcome(lambda: read(document), CertmountError)
    if isinstance(result, CertmountError):
        assert result.reason is Reason.INVALID_POLICY
        assert result.faults
    else:
        assert result.trust_domain == "td.example"


GLOBS = {"match_namespaces": parse_dns_label, "match_serviceAccounts": parse_object_name}


@given(st.sampled_from(list(GLOBS)), st.one_of(hostile_texts, st.text(alphabet="ab-.*", min_size=1, max_size=70)))
def test_glob_is_accepted_only_if_it_matches_a_kubernetes_name(key: str, text: str) -> None:
    result = outcome(lambda: read(rule(**{key: [text]})), CertmountError)
    legal = isinstance(outcome(lambda: GLOBS[key](text.replace("*", "a")), InvalidName), str)
    assert isinstance(result, Policy) == (legal and not set(text) - set("abcdefghijklmnopqrstuvwxyz0123456789.-*"))


@pytest.mark.parametrize(
    "change, field, words",
    [
        ({"match_namespaces": ["a.*"]}, "match.namespaces[0]", "'a.*' matches no name that Kubernetes allows: 'a.a' is not a name; use 1 to 63 lower-case letters, digits and inner hyphens"),
        ({"match_serviceAccounts": ["-*"]}, "match.serviceAccounts[0]", "'-*' matches no name that Kubernetes allows: '-a' is not the name of a Kubernetes object; use lower-case letters, digits, '-' and '.'"),
        ({"match_namespaceLabels": {"a": "-*"}}, "match.namespaceLabels.a", "'-*' is not a label value or a glob; use up to 63 letters, digits, '-', '_', '.', and * for any characters"),
        ({"allow_dns": ["my_host.*"]}, "allow.dns[0]", "'my_host.*' matches no valid name: 'my_host.a' has the label 'my_host'; labels have 1 to 63 letters, digits or inner hyphens"),
        ({"allow_dns": ["a.example.com."]}, "allow.dns[0]", "'a.example.com.' ends with a dot; remove it"),
        ({"allow_dns": ["10.0.0.1"]}, "allow.dns[0]", "'10.0.0.1' is a number or an IP address, not a DNS name"),
        ({"allow_uris": ["https://a.example/x/../*"]}, "allow.uris[0]", "'https://a.example/x/../*' matches no valid name: 'https://a.example/x/../a' has a path segment '.' or '..', which clients remove (RFC 3986 section 5.2.4)"),
        ({"allow_emails": ["a..*@example.com"]}, "allow.emails[0]", "'a..*@example.com' matches no valid name: 'a..a@example.com' is not an email address of the form name@domain in ASCII, without quotes, %, ! and *"),
    ],
)  # fmt: skip
def test_pattern_that_matches_no_valid_name_is_rejected(change: dict[str, Any], field: str, words: str) -> None:
    assert faults_of(rule(**change)) == {f"policy[0].{field}": f"policy[0].{field}: {words}"}


def test_pattern_without_its_dot_has_a_warning() -> None:
    document = rule(
        allow_dns=["*example.com", "*.example.com", "a*.example.com", "*-web.example.com", "{pod}example.com"],
        allow_emails=["*@example.com", "a@*{namespace}.example.com"],
        allow_without_spiffe_id=True,
    )
    assert read(document).warnings == (
        "policy[0].allow.dns[0]: '*example.com' also allows evilexample.com; for the names below the domain, write *.example.com",
        "policy[0].allow.dns[4]: '{pod}example.com' also allows evilexample.com; for the names below the domain, write {pod}.example.com",
        "policy[0].allow.emails[1]: 'a@*{namespace}.example.com' also allows a@evil{namespace}.example.com; for the names below the domain, write a@*.{namespace}.example.com",
    )  # fmt: skip


def test_uris_that_no_certificate_can_contain_have_a_warning() -> None:
    uris = ["https://example.com/*"]
    problem = "no certificate can contain these URIs, because a certificate with a SPIFFE ID has no other URI"
    assert read(rule(allow_uris=uris)).warnings == (f"policy[0].allow.uris: {problem}; set without_spiffe_id: true",)
    assert read(rule(allow_uris=uris, allow_without_spiffe_id=True)).warnings == ()


def test_quoted_boolean_is_explained() -> None:
    faults = faults_of(rule(allow_without_spiffe_id="true"))
    words = "'true' is a string in YAML, not a boolean; write true, without quotes"
    assert faults == {"policy[0].allow.without_spiffe_id": f"policy[0].allow.without_spiffe_id: {words}"}
