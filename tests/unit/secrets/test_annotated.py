"""Requests of Ingresses: kube-lego's annotations and classes, and faults that do not stop other entries."""

from __future__ import annotations

from datetime import timedelta

import pytest

from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.names import DNSName
from csi_driver.core.spec import KeyType
from csi_driver.kube.tls_secrets.source_objects import TLSEntry, TLSObject
from csi_driver.secrets.requests import CertificateOptions
from csi_driver.secrets.sources.annotated import SourceRules, read_annotated
from tests.support.hostile_csrs import internationalized_names

ON = {"kubernetes.io/tls-acme": "true"}
RULES = SourceRules(frozenset(["shop"]), "internal")


def ingress(*entries: TLSEntry, ingress_class: str = "", **annotations: str) -> TLSObject:
    target = EventTarget("shop", "web", "uid", "Ingress")
    known = {**ON, **{key.replace("_", "/", 1): value for key, value in annotations.items()}}
    return TLSObject(target, known, ingress_class, entries or (entry("tls", "a.example.com"),))


def entry(secret: str, *hosts: str, number: int = 0) -> TLSEntry:
    return TLSEntry(f"spec.tls[{number}]", secret, hosts)


@pytest.mark.parametrize("value", ["false", "True", "", "1"])
def test_only_the_annotation_true_requests_certificates(value: str) -> None:
    assert read_annotated(ingress(**{"kubernetes.io_tls-acme": value}), RULES).requests == ()


@pytest.mark.parametrize(
    "field,annotation,served",
    [
        ("nginx", None, True),
        ("", "nginx", True),
        ("", None, True),
        ("gce", None, False),
        ("nginx", "gce", False),
        ("gce", "nginx", True),
    ],
)
def test_classes_are_filtered_as_kube_lego_does(field: str, annotation: str | None, served: bool) -> None:
    annotations = {} if annotation is None else {"kubernetes.io_ingress.class": annotation}
    rules = SourceRules(frozenset(["shop"]), "internal", frozenset(["nginx"]))
    assert bool(read_annotated(ingress(ingress_class=field, **annotations), rules).requests) is served


def test_ingress_that_kube_lego_created_for_its_challenges_is_ignored() -> None:
    found = read_annotated(ingress(**{"kubernetes.io_kube-lego-managed": "true"}), RULES)
    assert (found.requests, found.faults) == ((), ())


def test_options_are_annotations() -> None:
    annotations = {
        "certmount.dev_issuer": "letsencrypt",
        "certmount.dev_key-type": "rsa-2048",
        "certmount.dev_duration": "24h",
    }
    (request,) = read_annotated(ingress(**annotations), RULES).requests
    assert request.options == CertificateOptions("letsencrypt", KeyType.RSA_2048, timedelta(hours=24))


def test_faulty_entries_do_not_stop_the_others() -> None:
    found = read_annotated(
        ingress(
            entry("good", "a.example.com", "A.example.com"),
            entry("bad", "b.example.com", "not_a_name", "localhost.", number=1),
            entry("", "c.example.com", number=2),
            entry("empty", number=3),
            entry("UPPER", "d.example.com", number=4),
            entry("many", *(f"h{number}.example.com" for number in range(101)), number=5),
        ),
        RULES,
    )
    assert [(str(one.secret), list(map(str, one.names))) for one in found.requests] == [
        ("shop/good", ["a.example.com"])
    ]
    assert [str(fault) for fault in found.faults] == [
        (
            "spec.tls[1].hosts[1]: 'not_a_name' has the label 'not_a_name'; labels have 1 to 63 letters, digits or inner "
            "hyphens"
        ),
        "spec.tls[1].hosts[2]: 'localhost.' ends with a dot; remove it",
        "spec.tls[2].secretName: is missing; name the Secret for the certificate",
        "spec.tls[3].hosts: is empty; list the DNS names of the certificate",
        (
            "spec.tls[4].secretName: 'UPPER' is not the name of a Kubernetes object; use lower-case letters, digits, '-' "
            "and '.'"
        ),
        "spec.tls[5].hosts: has more than 100 names; use several Secrets",
    ]


def test_invalid_option_is_a_fault_of_the_object() -> None:
    found = read_annotated(ingress(**{"certmount.dev_key-type": "DSA"}), RULES)
    assert found.requests == ()
    assert str(found.faults[0]).startswith("metadata.annotations[certmount.dev/key-type]: 'DSA' is not a key type; ")


def test_hosts_of_an_object_are_limited_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry(f"s{n}", *(f"h{n}-{host}.example.com" for host in range(100)), number=n) for n in range(6)]
    found = read_annotated(ingress(*entries), RULES)
    assert [one.secret.name for one in found.requests] == ["s0", "s1", "s2", "s3", "s4"]
    assert [str(fault) for fault in found.faults] == [
        "spec.tls[5]: is beyond the 500 hosts that certmount reads of one object; use several objects"
    ]
    monkeypatch.setattr(DNSName, "parse", lambda _: pytest.fail("parsed"))
    found = read_annotated(ingress(entry("tls", *internationalized_names(60))), RULES)
    assert [str(fault) for fault in found.faults] == [
        "spec: has more than 4096 characters of different xn-- labels; use several objects"
    ]


def test_entries_of_one_secret_with_too_many_names_keep_those_of_the_first() -> None:
    """A certificate has at most 100 names. The authority would refuse all of them."""
    entries = [entry("tls", *(f"h{n}-{host}.example.com" for host in range(60)), number=n) for n in range(2)]
    found = read_annotated(ingress(*entries), RULES)
    assert [len(one.names) for one in found.requests] == [60]
    assert [str(fault) for fault in found.faults] == [
        "spec.tls[1]: shop/tls: has more than 100 names together with those of spec.tls[0]; use another Secret"
    ]


def test_names_of_entries_with_one_secret_are_united() -> None:
    found = read_annotated(ingress(entry("tls", "a.example.com"), entry("tls", "b.example.com", number=1)), RULES)
    assert [list(map(str, one.names)) for one in found.requests] == [["a.example.com", "b.example.com"]]


def test_secrets_of_faulty_entries_keep_their_earlier_requests() -> None:
    before = read_annotated(ingress(entry("a", "a.example.com"), entry("b", "b.example.com", number=1)), RULES)
    faulty = read_annotated(ingress(entry("a", "not_a_name"), entry("c", "c.example.com", number=1)), RULES)
    assert [request.secret.name for request in faulty.with_earlier(before).requests] == ["c", "a"]
    invalid_option = read_annotated(ingress(**{"certmount.dev_key-type": "DSA"}), RULES)
    assert invalid_option.with_earlier(before).requests == before.requests
    switched_off = read_annotated(ingress(**{"kubernetes.io_tls-acme": "false"}), RULES)
    assert switched_off.with_earlier(before).requests == ()
