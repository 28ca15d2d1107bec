"""Which Secrets the sources request together, and the memory that a namespace can use for them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.errors import CertmountError, Fault
from csi_driver.core.names import DNSName
from csi_driver.core.shares import FairShares
from csi_driver.core.spec import KeyType
from csi_driver.secrets.requests import CertificateOptions, DesiredSecret, SecretName, Source, SourceRequest
from csi_driver.secrets.source_table import SourceCache, SourceTable

OPTIONS = CertificateOptions("internal")


class World:
    """A table, the Secrets that changed, and the failures."""

    def __init__(self, capacity: int = 2**20) -> None:
        self.changed: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.table = SourceTable(lambda secret: self.changed.append(str(secret)), self._fail)
        self.memory = FairShares("bytes of sources", capacity)
        self.cache: SourceCache[Source] = SourceCache(self.table, "ingresses", self.memory, lambda source: source)

    def _fail(self, target: EventTarget, error: CertmountError) -> None:
        self.failed.append((str(target), str(error)))

    def desired(self, name: str) -> DesiredSecret | None:
        return self.table.desired(SecretName(*name.split("/")))

    def names(self, name: str) -> list[str]:
        desired = self.desired(name)
        return [str(one) for one in desired.names] if desired else []


def source(
    name: str,
    *names: str,
    secret: str = "tls",
    namespace: str = "shop",
    kind: str = "Ingress",
    options: CertificateOptions = OPTIONS,
) -> Source:
    request = SourceRequest(SecretName(namespace, secret), tuple(map(DNSName.parse, names)), options, "spec.tls[0]")
    return Source(EventTarget(namespace, name, f"uid-{name}", kind), (request,) if names else ())


def test_names_of_several_ingresses_with_one_secret_are_united() -> None:
    world = World()
    world.cache.put(source("b", "b.example.com", "both.example.com"))
    world.cache.put(source("a", "a.example.com", "both.example.com"))
    assert world.names("shop/tls") == ["a.example.com", "both.example.com", "b.example.com"]
    world.cache.remove(source("a"))
    assert world.names("shop/tls") == ["b.example.com", "both.example.com"]
    world.cache.remove(source("b"))
    assert world.desired("shop/tls") is None


def test_source_that_has_not_changed_causes_no_work() -> None:
    world = World()
    for _ in range(3):
        world.cache.put(source("a", "a.example.com"))
    assert world.changed == ["shop/tls"]
    world.cache.put(source("a", "b.example.com"))
    assert world.changed == ["shop/tls"] * 2


def test_sources_with_other_options_are_refused_with_words() -> None:
    world = World()
    world.cache.put(source("a", "a.example.com"))
    world.cache.put(source("b", "b.example.com", options=CertificateOptions("letsencrypt", KeyType.RSA_2048)))
    assert world.names("shop/tls") == ["a.example.com"]
    problem = "spec.tls[0]: shop/tls: is also the Secret of Ingress shop/a, with other options; use another Secret"
    assert world.failed == [("Ingress shop/b", f"InvalidSource: {problem}")]


def test_many_ingresses_of_one_secret_do_not_flood_the_log() -> None:
    world = World(2**24)
    for number in range(1000):
        other = CertificateOptions("internal", duration=timedelta(seconds=100 + number))
        world.cache.put(source(f"i{number:04}", f"h{number}.example.com", options=other))
    assert world.names("shop/tls") == ["h0.example.com"]
    assert [target for target, _ in world.failed] == [f"Ingress shop/i{number:04}" for number in range(1, 11)]


def test_ingress_cannot_add_names_to_a_secret_of_a_list() -> None:
    """Otherwise one name that the policy refuses would stop the administrator's certificate."""
    world = World()
    world.cache.put(source("a", "evil.example.com"))
    world.cache.put(source("z", "good.example.com", kind="ConfigMap"))
    assert world.names("shop/tls") == ["good.example.com"]
    assert [target for target, _ in world.failed] == ["Ingress shop/a"]


def test_certificate_with_too_many_names_keeps_those_of_the_first_sources() -> None:
    world = World()
    for number in range(3):
        world.cache.put(source(f"ingress-{number}", *(f"h{number}-{host}.example.com" for host in range(40))))
    assert len(world.names("shop/tls")) == 80
    assert "has more than 100 names together with those of Ingress shop/ingress-0" in world.failed[0][1]


def test_faults_are_reported_once_until_they_change() -> None:
    world = World()
    faulty = Source(source("a").target, (), (Fault("spec.tls[0]", "is wrong"),))
    world.cache.put(faulty)
    world.cache.put(faulty)
    assert world.failed == [("Ingress shop/a", "InvalidSource: spec.tls[0]: is wrong")]
    world.cache.put(Source(faulty.target, (), (Fault("spec.tls[0]", "is worse"),)))
    assert len(world.failed) == 2


def test_namespace_with_10_000_ingresses_uses_up_only_its_share() -> None:
    world = World(32 * 2**20)
    for number in range(10_000):
        world.cache.put(source(f"i-{number}", f"h{number}.example.com", secret=f"tls-{number}"))
    served = len(world.table)
    assert 5_000 < served < 10_000
    target, text = world.failed[0]
    assert target == f"Ingress shop/i-{served}"
    assert text.startswith("ShareExceeded: namespace shop: holds ")
    world.cache.put(source("web", "web.example.com", namespace="web"))
    assert world.names("web/tls") == ["web.example.com"]
    world.cache.retain(set())
    assert (world.memory.total, len(world.table)) == (0, 0)


def test_only_sources_that_are_removed_or_shrink_make_room_for_refused_ones() -> None:
    """If a source that stays the same did, each list would lead to another one."""
    world = World(9000)
    shares = world.cache.shares
    large, small = ("a.example.com", "b.example.com"), ("a.example.com",)
    assert world.cache.put(source("a", *large)) is not None
    assert world.cache.put(source("z", "z.example.com", secret="z")) is None
    world.cache.put(source("a", *large))
    assert (shares.refusing, shares.has_room, world.memory.total > 0) == (True, False, True)
    world.cache.put(source("a", *small))
    assert (shares.refusing, shares.has_room) == (True, True)
    shares.start_list()
    assert world.cache.put(source("z", "z.example.com", secret="z")) is None
    assert (shares.refusing, shares.has_room) == (True, False)
    world.cache.put(source("a", *(f"h{number}.example.com" for number in range(40))))
    assert (world.names("shop/tls"), shares.has_room, world.memory.total) == ([], True, 0), "it is refused, too"
    assert world.cache.put(source("a", *small)) is not None
    world.cache.remove(source("a", *small))
    assert (shares.has_room, world.memory.total) == (True, 0)


def test_objects_that_request_nothing_use_no_memory() -> None:
    world = World()
    for number in range(100):
        assert world.cache.put(source(f"i-{number}")) is not None
    assert world.memory.total == 0


def test_source_that_is_not_valid_keeps_what_it_requested() -> None:
    world = World()
    both = source("a", "a.example.com"), source("a", "b.example.com", secret="other")
    valid = Source(both[0].target, (*both[0].requests, *both[1].requests))
    world.cache.put(valid)
    size, fault = world.memory.total, (Fault("list", "is wrong"),)
    unknown = Source(valid.target, (), fault, None)
    for _ in range(3):
        world.cache.put(unknown)
    assert (world.names("shop/tls"), world.names("shop/other")) == (["a.example.com"], ["b.example.com"])
    assert (world.memory.total - size, len(world.failed)) == (len("list: is wrong"), 1)
    world.cache.put(Source(valid.target, (), fault, frozenset([SecretName("shop", "tls")])))
    assert (world.names("shop/tls"), world.names("shop/other")) == (["a.example.com"], [])
    world.cache.put(Source(valid.target, both[1].requests, fault, frozenset([SecretName("shop", "tls")])))
    assert (world.names("shop/tls"), world.names("shop/other")) == (["a.example.com"], ["b.example.com"])
    assert world.table.find(("Ingress", "shop", "a")) == Source(valid.target, valid.requests[::-1], fault)
    successor = replace(unknown, target=replace(valid.target, uid="another"))
    world.cache.put(successor)
    assert len(world.table) == 0, "another object with the same name"
    world.cache.put(valid)
    world.cache.put(Source(valid.target))
    assert (len(world.table), world.memory.total) == (0, 0)
