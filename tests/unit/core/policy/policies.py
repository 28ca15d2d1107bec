"""Pods, policies and requests for tests, and hypothesis strategies for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity, SecretIdentity, ServiceAccount
from csi_driver.core.names import EmailAddress, InvalidName, Names
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import Grant, Policy, PolicySubject, RequestedCertificate
from csi_driver.core.spec import KeyType, Usage
from csi_driver.core.subject import Subject, SubjectAttribute
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
    """Return a rule for all pods. It allows other URIs in place of the SPIFFE ID."""
    return Entry(names=patterns, longest=None if hours is None else hours * HOUR, without_spiffe_id=True)


def subject(pod: Pod = POD) -> PolicySubject:
    if pod.secret:
        return PolicySubject(SecretIdentity(pod.namespace, pod.secret), dict(pod.labels))
    account = ServiceAccount(pod.namespace, pod.account)
    identity = PodIdentity(account, "sa-uid", pod.name, "pod-uid", "node-1", "node-uid", 2e9)
    return PolicySubject(identity, dict(pod.labels), pod.services, pod.governing)


def requested(request: Request) -> RequestedCertificate:
    return RequestedCertificate(
        names(*request.names),
        KeyType(request.key_type),
        usages=tuple(Usage(usage) for usage in request.usages),
        duration=None if request.seconds is None else timedelta(seconds=request.seconds),
        issuer=request.issuer,
        spiffe=request.spiffe,
        acme_email=EmailAddress.parse(request.acme_email) if request.acme_email else None,
        subject=Subject(tuple(SubjectAttribute.parse(text) for text in request.subject)),
    )


def decide(rules: Policy, *texts: str, hours: int | None = None, pod: Pod = POD) -> Grant | CertmountError:
    """Return the grant, or the error. A request for URIs excludes the pod's SPIFFE ID."""
    spiffe = not any("://" in text for text in texts)
    request = Request(texts, seconds=None if hours is None else hours * HOUR, spiffe=spiffe)
    return outcome(lambda: rules.decide(subject(pod), requested(request)), CertmountError)


def is_name(text: str) -> bool:
    return isinstance(outcome(lambda: names(text), InvalidName), Names)


# Few letters, so that patterns often match names.
NAMESPACES = ["a", "ab", "b-a"]
ACCOUNTS = ["a", "b", "a.b", "ab-a"]
PODS = ["a", "b", "ab", "b-0", "a.b"]
SERVICES = ["a", "b", "ab", "b-a"]
ADDRESSES = ["10.0.0.1", "10.0.255.1", "10.1.0.0", "192.0.2.7", "::a00:1", "fd00::1", "fd00:0:0:1::1", "fe80::1"]
RANGES_TEXT = "10.0.0.0/8 10.0.0.0/16 10.0.0.1 0.0.0.0/0 192.0.2.6/31 ::/0 fd00::/64 fd00::/8 fd00::1"
RANGES = RANGES_TEXT.split()

pods = st.builds(
    lambda pod, is_governed: replace(pod, governing=pod.services[0] if is_governed and pod.services else ""),
    st.builds(
        Pod,
        st.sampled_from(NAMESPACES),
        st.sampled_from(ACCOUNTS),
        st.sampled_from(PODS),
        st.sampled_from([(), (("team", "a"),), (("team", "ab"), ("stage", ""))]),
        st.lists(st.sampled_from(SERVICES), max_size=3, unique=True).map(tuple),
    ),
    st.booleans(),
)
part_pieces = st.sampled_from([*"ab**", "a-b", "{namespace}", "{service_account}", "{pod}", "{service}", "{service}"])
pattern_parts = st.lists(part_pieces, min_size=1, max_size=3).map(lambda pieces: re.sub(r"\*+", "*", "".join(pieces)))
dns_patterns = st.builds(
    lambda parts, end: ".".join(parts) + end,
    st.lists(pattern_parts, min_size=1, max_size=3),
    st.sampled_from(["", ".example", ".svc", ".{cluster_domain}"]),
)
uri_patterns = st.builds(
    lambda host, path: "/".join([host, *path]),
    st.sampled_from(["spiffe://{trust_domain}", "spiffe://a.b", "https://a.b"]),
    st.lists(pattern_parts, min_size=1, max_size=3),
)
email_patterns = st.builds("{}@{}".format, pattern_parts, dns_patterns)
text_patterns = st.one_of(dns_patterns, uri_patterns, email_patterns)
patterns = st.one_of(text_patterns, st.sampled_from(RANGES))


subject_patterns = st.one_of(
    st.builds("{}={}".format, st.sampled_from(["CN", "CN", "O", "OU"]), pattern_parts),
    st.sampled_from(["CN={pod}", "CN=*", "CN={service}.{cluster_domain}", "O={namespace} {service_account}", "C=DE"]),
)
rule_subjects = st.one_of(st.just(()), st.lists(subject_patterns, min_size=1, max_size=3).map(tuple))


def is_for_secrets(pattern: str) -> bool:
    return not pattern.startswith("spiffe:") and not re.search(r"\{(service_account|pod|service)\}", pattern)


def fill(pattern: str, values: Mapping[str, str], fillings: list[str]) -> str:
    for placeholder, value in {**DOMAINS, **values}.items():
        pattern = pattern.replace("{" + placeholder + "}", value)
    literals = pattern.split("*")
    return literals[0] + "".join(fillings[at % len(fillings)] + literal for at, literal in enumerate(literals[1:]))


def near_names(pattern: st.SearchStrategy[str], values: st.SearchStrategy[dict[str, str]]) -> st.SearchStrategy[str]:
    """Return names that match patterns, or nearly; most contain the pod's values."""
    fillings = st.sampled_from(["a", "b", "ab", "a-b"] * 4 + ["*", "", "a.b", "/", "@"])
    return st.builds(fill, pattern, values, st.lists(fillings, min_size=1, max_size=4))


durations = st.sampled_from([None, None, None, 10, HOUR, 2 * HOUR, 12 * HOUR, 24 * HOUR, 25 * HOUR, 48 * HOUR])
Limit = st.SearchStrategy[tuple[str, ...] | None]
usages: Limit = st.sampled_from([None, None, None, ("server",), ("client",), ("server", "client")])
issuers: Limit = st.sampled_from([None, None, None, ("internal", "acme"), ("acme",)])
key_types: Limit = st.sampled_from([None, None, None, ("EC-P256", "RSA-2048"), ("RSA-2048",)])
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
secret_entries = st.builds(
    Entry,
    st.sampled_from([("*",), ("*",), ("a", "*b")]),
    names=st.lists(patterns.filter(is_for_secrets), max_size=3).map(tuple),
    usages=usages,
    longest=st.sampled_from([None, None, 48 * HOUR]),
    issuers=issuers,
    secrets=st.sampled_from([("*",), ("*",), ("a", "*.b")]),
    acme_emails=st.sampled_from([(), (), ("*@a.example",), ("{namespace}@a.example", "ops@*.example")]),
)
secrets = st.builds(lambda pod, name: replace(pod, secret=name), pods, st.sampled_from(ACCOUNTS))


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """Draw a rule for pods. Most match every pod and many have no limits, so that many requests are allowed."""
    match = draw(st.sampled_from([*[ALL_PODS] * 8, *MATCHES]))
    allowed = tuple(draw(st.lists(patterns, max_size=3)))
    if draw(st.booleans()):
        return Entry(*match, allowed, without_spiffe_id=draw(st.sampled_from([True, None])))
    shortest, longest = draw(ordered)
    if shortest is not None and longest is None and shortest > 24 * HOUR:
        longest = 72 * HOUR
    without = draw(st.sampled_from([True, True, False, None]))
    return Entry(*match, allowed, draw(key_types), draw(usages), shortest, longest, draw(issuers), without)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[Entry], Pod, Request]:
    """Draw a policy, a pod, and a request that is near to what the policy allows."""
    return draw(near_requests(entries(), pods))


@st.composite
def requests_with_subjects(draw: st.DrawFn) -> tuple[list[Entry], Pod, Request]:
    """Draw a policy with rules for subjects, a pod, and a request with a subject as :func:`requests`."""
    rules, pod, request = draw(near_requests(st.builds(_with_subjects, entries(), rule_subjects), pods))
    return rules, pod, replace(request, subject=draw(near_subjects(rules, pod, request)))


def _with_subjects(entry: Entry, subjects: tuple[str, ...]) -> Entry:
    return replace(entry, subjects=subjects)


def near_subjects(rules: list[Entry], pod: Pod, request: Request) -> st.SearchStrategy[tuple[str, ...]]:
    """Return subjects that the rules allow, or nearly: no attributes, one, or a few of different types."""
    allowed = [pattern for entry in rules for pattern in entry.subjects]
    values = st.sampled_from([*pod.values()])
    texts = [near_names(st.sampled_from([*allowed * 4, "O=a", "CN={pod}"]), values)]
    texts += [st.sampled_from([f"CN={name}" for name in request.names])] if request.names else []
    valid = st.one_of(*texts).filter(_is_attribute)
    count = st.sampled_from([1, 1, 2])
    return count.flatmap(
        lambda size: st.lists(valid, max_size=size, unique_by=lambda text: text.partition("=")[0]).map(tuple)
    )


def _is_attribute(text: str) -> bool:
    return isinstance(outcome(lambda: SubjectAttribute.parse(text), InvalidName), SubjectAttribute)


@st.composite
def requests_for_secrets(draw: st.DrawFn) -> tuple[list[Entry], Pod, Request]:
    """Draw a policy with rules for pods and for Secrets, a Secret, and a request as :func:`requests`."""
    rules, secret, request = draw(near_requests(st.one_of(secret_entries, secret_entries, entries()), secrets))
    email = draw(st.sampled_from(["", "", "a@a.example", "ops@b.example", "x@y.z.example"]))
    return rules, secret, replace(request, spiffe=False, acme_email=email)


@st.composite
def near_requests(
    draw: st.DrawFn, rule: st.SearchStrategy[Entry], requester: st.SearchStrategy[Pod]
) -> tuple[list[Entry], Pod, Request]:
    rules = draw(st.lists(rule, min_size=draw(st.sampled_from([0, 1, 1, 2])), max_size=4))
    pod = draw(requester)
    allowed = [pattern for entry in rules for pattern in entry.names if kind_of(pattern) != "ips"]
    ranges = [pattern for entry in rules for pattern in entry.names if kind_of(pattern) == "ips"]
    own = f"spiffe://{DOMAINS['trust_domain']}/ns/{pod.namespace}/sa/{pod.account}"
    values = st.sampled_from([*pod.values()] * 4 + [dict.fromkeys(next(pod.values()), "a")])
    near = near_names(
        st.sampled_from([*allowed * 6, "{service}.{namespace}.svc", "{pod}.{service}.{namespace}.svc", own]), values
    )
    sources = [*[near] * 6, near_names(text_patterns, values), *[st.sampled_from(ADDRESSES)] * (1 + 3 * bool(ranges))]
    texts = draw(st.lists(st.one_of(*sources), min_size=draw(st.sampled_from([0, 1, 1])), max_size=2))
    written = tuple(dict.fromkeys(str(name) for text in texts if is_name(text) for name in names(text)))
    spiffe = draw(st.sampled_from([True, True, not any("://" in name for name in written)]))
    if draw(st.booleans()):
        return rules, pod, Request(written, spiffe=spiffe)
    key_type = draw(st.sampled_from(["EC-P256"] * 3 + ["RSA-2048", "Ed25519"]))
    issuer = st.sampled_from(["internal", "acme"])
    wanted = draw(usages)
    return rules, pod, Request(written, key_type, wanted or (), draw(durations), draw(issuer), spiffe)
