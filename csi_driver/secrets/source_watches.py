"""The watches of all sources."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csi_driver.core.shares import FairShares
from csi_driver.kube.connection import Api
from csi_driver.kube.reflector import Reflector
from csi_driver.kube.tls_secrets.watches import gateway_watch, ingress_watch, list_watch, read_gateway
from csi_driver.secrets.gateway_cache import GatewayCache, GatewayWatch
from csi_driver.secrets.requests import Source, UnreadSources
from csi_driver.secrets.settings import SecretsSettings
from csi_driver.secrets.source_table import MAX_SOURCE_BYTES, SourceCache, SourceTable
from csi_driver.secrets.sources.annotated import SourceRules, read_annotated
from csi_driver.secrets.sources.certificate_list import LIST_KEY, MAX_LIST_BYTES, read_certificate_list

_SYNC_S = 30.0
"""How long to wait for all sources. After that, the certificates of Secrets with unread sources keep their names."""
_FAILING_S = 5.0
"""How long to wait for lists that fail. A single failure is retried within a second; a missing Role needs a person."""
_SYNC_INTERVAL_S = 0.2


SourceWatch = Reflector[Any] | GatewayWatch


@dataclass(frozen=True, eq=False)
class SourceWatches:
    """The watches of all sources, by the Secrets that their objects can request."""

    by_namespace: Mapping[str, Sequence[SourceWatch]]
    by_list: Mapping[str, SourceWatch]  # by KIND/NAMESPACE/NAME

    def __iter__(self) -> Iterator[SourceWatch]:
        for watches in self.by_namespace.values():
            yield from watches
        yield from self.by_list.values()

    def unread(self, namespace: str) -> UnreadSources:
        """Return the watches that have not read all their objects yet, of those that can request Secrets of a namespace.

        A watch that fails later keeps what it has read.
        """
        watches = self.by_namespace.get(namespace, ())
        return UnreadSources(
            tuple(watch.resource.name for watch in watches if not watch.synced),
            tuple(name for name, watch in self.by_list.items() if not watch.synced),
        )


def source_watches(api: Api, settings: SecretsSettings, table: SourceTable) -> SourceWatches:
    """Return the watches that keep the table current."""
    rules = SourceRules(frozenset(settings.namespaces), settings.default_issuer, settings.ingress_classes)
    memory = FairShares("bytes of Ingresses, Gateways and lists", MAX_SOURCE_BYTES)

    def cache(resource: str, read: Callable[[Any, SourceRules], Source]) -> SourceCache[Any]:
        return SourceCache(table, resource, memory, lambda item: read(item, rules))

    def gateways(namespace: str) -> GatewayWatch:
        found = GatewayCache(cache("gateways", read_annotated), functools.partial(read_gateway, api))
        return GatewayWatch(gateway_watch(api, namespace, found), found)

    def watches_of(namespace: str) -> Iterator[SourceWatch]:
        if settings.gateways:
            yield gateways(namespace)
        yield ingress_watch(api, namespace, cache("ingresses", read_annotated))

    def list_of(namespace: str, name: str) -> SourceWatch:
        return list_watch(api, namespace, name, LIST_KEY, MAX_LIST_BYTES, cache("configmaps", read_certificate_list))

    return SourceWatches(
        {namespace: tuple(watches_of(namespace)) for namespace in settings.namespaces},
        {f"ConfigMap/{namespace}/{name}": list_of(namespace, name) for namespace, name in settings.lists},
    )


async def wait_for_sources(watches: Iterable[SourceWatch]) -> Sequence[str]:
    """Wait for all sources, because several can request one Secret: the names of one alone would be too few.

    Return the resources that have not been read in time: a namespace without the Role must not stop the others.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    while pending := [watch for watch in watches if _is_pending(watch)]:
        failing = all(watch.failing_since is not None for watch in pending)
        if loop.time() - started > (_FAILING_S if failing else _SYNC_S):
            break
        await asyncio.sleep(_SYNC_INTERVAL_S)
    return [watch.resource.name for watch in watches if not watch.synced]


def _is_pending(watch: SourceWatch) -> bool:
    """Return whether waiting for the watch can help: a tenant's invalid Gateway must not delay the others."""
    return not watch.synced and not (isinstance(watch, GatewayWatch) and watch.stuck)
