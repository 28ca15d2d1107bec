"""The policy file: read whole, or refused with everything that is wrong with it, by its path."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.policy import DEFAULT_DURATION, Policy
from csi_driver.core.policy_document import parse_policy
from tests.unit.core.outcomes import outcome
from tests.unit.core.strategies import hostile_texts

GOOD: dict[str, Any] = {
    "match": {"namespaces": ["web", "team-*"], "serviceAccounts": ["*"]},
    "allow": {
        "dns": ["*.{namespace}.svc.{cluster_domain}"],
        "uris": ["spiffe://{trust_domain}/ns/{namespace}/app/*"],
        "max_duration": "48h",
    },
}


def read(document: object) -> Policy:
    return parse_policy(document, trust_domain="td.example", cluster_domain="cluster.local")


def rule(**changes: object) -> dict[str, list[Any]]:
    """A file of one rule, with ``match_x`` or ``allow_x`` changed, or ``match`` or ``allow`` as a whole."""
    parts: dict[str, Any] = {"match": dict(GOOD["match"]), "allow": dict(GOOD["allow"])}
    for key, value in changes.items():
        part, _, field = key.partition("_")
        if field:
            parts[part][field] = value
        else:
            parts[part] = value
    return {"policy": [parts]}


def faults_of(document: object) -> dict[str, str]:
    with pytest.raises(CertmountError) as raised:
        read(document)
    assert raised.value.reason is Reason.INVALID_POLICY
    return {fault.field: str(fault) for fault in raised.value.faults if isinstance(fault, Fault)}


@pytest.mark.parametrize("document", [None, {}, {"policy": None}, {"policy": []}])
def test_an_empty_file_is_the_default_policy(document: object) -> None:
    """No rules: every pod gets its SPIFFE ID and nothing else."""
    assert read(document) == Policy("td.example")


def test_a_rule_is_read_with_the_domains_put_in() -> None:
    """The administrator's own values are known when the file is read; those of pods stay open."""
    (made,) = read({"policy": [GOOD]}).rules
    assert made.namespaces == ("web", "team-*")
    assert made.service_accounts == ("*",)
    assert [str(pattern) for pattern in made.dns] == ["*.{namespace}.svc.cluster.local"]
    assert [str(pattern) for pattern in made.uris] == ["spiffe://td.example/ns/{namespace}/app/*"]
    assert made.max_duration == timedelta(hours=48)
    assert read(rule(allow_max_duration="10s")).rules[0].max_duration == timedelta(seconds=10)
    (made,) = read(rule(allow={"dns": ["a.example"]})).rules
    assert (made.uris, made.max_duration) == ((), DEFAULT_DURATION)


@pytest.mark.parametrize(
    "document, field, words",
    [
        ("text", "policy file", "is not a mapping"),
        ([], "policy file", "is not a mapping"),
        ({"rules": []}, "policy file.rules", "is not known; known are policy"),
        ({"policy": {}}, "policy", "is not a list of rules"),
        ({"policy": ""}, "policy", "is not a list of rules"),
        ({"policy": 0}, "policy", "is not a list of rules"),
        ({"policy": ["x"]}, "policy[0]", "is not a mapping; expected are the keys match, allow"),
        (rule(match_pods=["x"]), "policy[0].match.pods", "is not known; known are namespaces, serviceAccounts"),
        (rule(match={"namespaces": ["*"]}), "policy[0].match.serviceAccounts", "is missing"),
        (rule(match_namespaces="web"), "policy[0].match.namespaces", "is not a list"),
        (rule(match_namespaces=[7]), "policy[0].match.namespaces[0]", "7 is not a text; put it in quotes"),
        (rule(match_namespaces=["we b"]), "policy[0].match.namespaces[0]", "'we b' is not a name or a glob"),
        (rule(match_namespaces=["Web"]), "policy[0].match.namespaces[0]", "'Web' is not a name or a glob: lower-case"),
        (rule(match_namespaces=[""]), "policy[0].match.namespaces[0]", "is not a name or a glob"),
        (rule(allow_hosts=["x"]), "policy[0].allow.hosts", "is not known; known are dns, uris, max_duration"),
        (
            rule(allow_dns=["{sevice}.x"]),
            "policy[0].allow.dns[0]",
            "unknown placeholder {sevice}; known are {namespace}",
        ),
        (rule(allow_uris=["*://x/"]), "policy[0].allow.uris[0]", "scheme and host written out"),
        (rule(allow_max_duration="1d"), "policy[0].allow.max_duration", "'1d' is not a duration"),
        (rule(allow_max_duration="-1h"), "policy[0].allow.max_duration", "'-1h' is negative"),
        (rule(allow_max_duration="9s"), "policy[0].allow.max_duration", "'9s' is not a duration of 10s or more"),
        (rule(allow_max_duration=3600), "policy[0].allow.max_duration", "3600 is not a duration of 10s or more"),
    ],
)
def test_what_is_wrong_is_said_by_its_path(document: object, field: str, words: str) -> None:
    """An administrator finds the place without a line number."""
    faults = faults_of(document)
    assert list(faults) == [field]
    assert words in faults[field]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """One round of corrections is enough, whatever rule the slips are in."""
    (first,) = rule(allow_dns=["**"], match_namespaces=["A"])["policy"]
    faults = faults_of({"policy": [first, GOOD, {"allow": {"uris": ["x"]}}, 7]})
    assert list(faults) == [
        "policy[0].match.namespaces[0]",
        "policy[0].allow.dns[0]",
        "policy[2].match",
        "policy[2].allow.uris[0]",
        "policy[3]",
    ]


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), hostile_texts, st.dates()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.sampled_from(["policy", "match", "allow", "dns", "uris", "max_duration"]), st.integers()),
            inner,
        ),
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
def test_any_data_is_a_policy_or_one_error(document: object) -> None:
    """Whatever a YAML file can hold: a policy, or InvalidPolicy with a place for every fault."""
    result = outcome(lambda: read(document), CertmountError)
    if isinstance(result, CertmountError):
        assert result.reason is Reason.INVALID_POLICY
        assert result.faults
    else:
        assert result.trust_domain == "td.example"


@given(hostile_texts)
def test_any_glob_is_one_or_a_fault(text: str) -> None:
    """What is accepted can match a Kubernetes name; what can't is told."""
    result = outcome(lambda: read(rule(match_namespaces=[text])), CertmountError)
    assert isinstance(result, Policy) == (bool(text) and not set(text) - set("abcdefghijklmnopqrstuvwxyz0123456789.-*"))
