"""Pods, policies and requests for tests, and hypothesis strategies for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta

from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import InvalidName, Names
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import Grant, Policy, PolicySubject, RequestedCertificate
from csi_driver.core.spec import KeyType, Usage
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import names
from tests.unit.core.policy.reference import HOUR, Entry, Pod, Request, kind_of

DOMAINS = {"trust_domain": "td.example", "cluster_domain": "cluster.local"}
POD = Pod("web", "edge", "edge-0")


def policy(*entries: Entry, deny: tuple[tuple[str, str], ...] = ()) -> Policy:
    """Return a policy with these rules; ``deny`` has globs for namespaces and service accounts."""
    document = {
        "policy": [entry.document() for entry in entries],
        "deny": [
            {"match": {"namespaces": [namespace], "serviceAccounts": [account]}, "reason": "stolen"}
            for namespace, account in deny
        ],
    }
    return parse_policy(document, trust_domain=DOMAINS["trust_domain"], cluster_domain=DOMAINS["cluster_domain"])


def rule_for_all(*patterns: str, hours: int | None = None) -> Entry:
    """Return a rule for all pods."""
    return Entry(names=patterns, longest=None if hours is None else hours * HOUR)


def subject(pod: Pod = POD) -> PolicySubject:
    account = ServiceAccount(pod.namespace, pod.account)
    identity = PodIdentity(account, "sa-uid", pod.name, "pod-uid", "node-1", "node-uid", 2e9)
    return PolicySubject(identity, dict(pod.labels), pod.services)


def requested(request: Request) -> RequestedCertificate:
    return RequestedCertificate(
        names(*request.names),
        KeyType(request.key_type),
        usages=tuple(Usage(usage) for usage in request.usages),
        duration=None if request.seconds is None else timedelta(seconds=request.seconds),
        issuer=request.issuer,
    )


def decide(rules: Policy, *texts: str, hours: int | None = None, pod: Pod = POD) -> Grant | CertmountError:
    """Return the grant, or the error."""
    request = Request(texts, seconds=None if hours is None else hours * HOUR)
    return outcome(lambda: rules.decide(subject(pod), requested(request)), CertmountError)


def is_name(text: str) -> bool:
    return isinstance(outcome(lambda: names(text), InvalidName), Names)


# Few letters, so that patterns often match names.
NAMESPACES = ["a", "ab", "b-a"]
ACCOUNTS = ["a", "b", "a.b", "ab-a"]
PODS = ["a", "b", "ab", "b-0", "a.b"]
SERVICES = ["a", "b", "ab", "b-a"]
ADDRESSES = ["10.0.0.1", "10.0.255.1", "10.1.0.0", "192.0.2.7", "::a00:1", "fd00::1", "fd00:0:0:1::1", "fe80::1"]
RANGES = [
    "10.0.0.0/8",
    "10.0.0.0/16",
    "10.0.0.1",
    "0.0.0.0/0",
    "192.0.2.6/31",
    "::/0",
    "fd00::/64",
    "fd00::/8",
    "fd00::1",
]

pods = st.builds(
    Pod,
    st.sampled_from(NAMESPACES),
    st.sampled_from(ACCOUNTS),
    st.sampled_from(PODS),
    st.sampled_from([(), (("team", "a"),), (("team", "ab"), ("stage", ""))]),
    st.lists(st.sampled_from(SERVICES), max_size=3, unique=True).map(tuple),
)
part_pieces = st.sampled_from(
    ["a", "b", "a-b", "*", "*", "{namespace}", "{service_account}", "{pod}", "{service}", "{service}"]
)
pattern_parts = st.lists(part_pieces, min_size=1, max_size=3).map(lambda pieces: re.sub(r"\*+", "*", "".join(pieces)))
dns_patterns = st.builds(
    lambda parts, end: ".".join(parts) + end,
    st.lists(pattern_parts, min_size=1, max_size=3),
    st.sampled_from(["", ".example", ".svc", ".{cluster_domain}"]),
)
uri_patterns = st.builds(
    lambda host, path: "/".join([f"spiffe://{host}", *path]),
    st.sampled_from(["{trust_domain}", "a.b"]),
    st.lists(pattern_parts, min_size=1, max_size=3),
)
email_patterns = st.builds("{}@{}".format, pattern_parts, dns_patterns)
text_patterns = st.one_of(dns_patterns, uri_patterns, email_patterns)
patterns = st.one_of(text_patterns, st.sampled_from(RANGES))


def fill(pattern: str, values: Mapping[str, str], fillings: list[str]) -> str:
    for placeholder, value in {**DOMAINS, **values}.items():
        pattern = pattern.replace("{" + placeholder + "}", value)
    literals = pattern.split("*")
    return literals[0] + "".join(
        fillings[index % len(fillings)] + literal for index, literal in enumerate(literals[1:])
    )


def near_names(pattern: st.SearchStrategy[str], values: st.SearchStrategy[dict[str, str]]) -> st.SearchStrategy[str]:
    """Return names that match patterns, or nearly; most contain the pod's values."""
    fillings = st.sampled_from(["a", "b", "ab", "a-b"] * 4 + ["*", "", "a.b", "/", "@"])
    return st.builds(fill, pattern, values, st.lists(fillings, min_size=1, max_size=4))


durations = st.sampled_from([None, None, None, 10, HOUR, 2 * HOUR, 12 * HOUR, 24 * HOUR, 25 * HOUR, 48 * HOUR])
usages: st.SearchStrategy[tuple[str, ...] | None] = st.sampled_from(
    [None, None, None, ("server",), ("client",), ("server", "client")]
)
issuers: st.SearchStrategy[tuple[str, ...] | None] = st.sampled_from(
    [None, None, None, ("internal", "acme"), ("acme",)]
)
key_types: st.SearchStrategy[tuple[str, ...] | None] = st.sampled_from(
    [None, None, None, ("EC-P256", "RSA-2048"), ("RSA-2048",)]
)
ordered = st.tuples(durations, durations).map(
    lambda ends: (ends[1], ends[0]) if ends[0] and ends[1] and ends[0] > ends[1] else ends
)


_Match = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]
MATCHES: list[_Match] = [
    (("a", "*b"), ("a", "*.b"), ()),
    (("a*", "b-*"), ("*",), ()),
    (("*",), ("ab-*", "b"), (("team", "a*"),)),
    (("*",), ("*",), (("team", "a"),)),
    (("*",), ("*",), (("stage", ""),)),
]
"""Namespaces, service accounts and labels."""
ALL_PODS: _Match = (("*",), ("*",), ())


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """Draw a rule. Most match every pod and many have no limits, so that many requests are allowed."""
    match = draw(st.sampled_from([*[ALL_PODS] * 8, *MATCHES]))
    allowed = tuple(draw(st.lists(patterns, max_size=3)))
    if draw(st.booleans()):
        return Entry(*match, allowed)
    shortest, longest = draw(ordered)
    if shortest is not None and longest is None and shortest > 24 * HOUR:
        longest = 72 * HOUR
    return Entry(*match, allowed, draw(key_types), draw(usages), shortest, longest, draw(issuers))


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[Entry], Pod, Request]:
    """Draw a policy, a pod, and a request that is near to what the policy allows."""
    rules = draw(st.lists(entries(), min_size=draw(st.sampled_from([0, 1, 1, 2])), max_size=4))
    pod = draw(pods)
    allowed = [pattern for entry in rules for pattern in entry.names if kind_of(pattern) != "ips"]
    ranges = [pattern for entry in rules for pattern in entry.names if kind_of(pattern) == "ips"]
    own = f"spiffe://{DOMAINS['trust_domain']}/ns/{pod.namespace}/sa/{pod.account}"
    values = st.sampled_from([*pod.values()] * 4 + [dict.fromkeys(next(pod.values()), "a")])
    near = near_names(st.sampled_from([*allowed * 6, "{service}.{namespace}.svc", own]), values)
    sources = [*[near] * 6, near_names(text_patterns, values), *[st.sampled_from(ADDRESSES)] * (1 + 3 * bool(ranges))]
    texts = draw(st.lists(st.one_of(*sources), min_size=draw(st.sampled_from([0, 1, 1])), max_size=2))
    written = tuple(dict.fromkeys(str(name) for text in texts if is_name(text) for name in names(text)))
    if draw(st.booleans()):
        return rules, pod, Request(written)
    requested_usages = draw(usages)
    key_type = draw(st.sampled_from(["EC-P256"] * 3 + ["RSA-2048", "Ed25519"]))
    return (
        rules,
        pod,
        Request(
            written, key_type, requested_usages or (), draw(durations), draw(st.sampled_from(["internal", "acme"]))
        ),
    )
