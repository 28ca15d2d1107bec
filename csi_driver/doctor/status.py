"""The state of an installation: what each replica of the authority and each node driver sees."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csi_driver.doctor.installation import Installation
from csi_driver.doctor.programs import AUTHORITY, NODE, STATUS, ProgramPage


@dataclass(frozen=True, slots=True)
class StatusProblem:
    """What is wrong with a program, an issuer or a certificate."""

    subject: str
    problem: str


@dataclass(frozen=True, slots=True)
class InstallationStatus:
    """The pages of all programs. ``certificates`` are those of the selected pods, the ones with problems first."""

    authorities: Sequence[ProgramPage]
    nodes: Sequence[ProgramPage]
    certificates: Sequence[Mapping[str, Any]]

    @property
    def authority(self) -> Mapping[str, Any]:
        """The page of a replica: all replicas have the same CA and the same files."""
        return next((page.document for page in self.authorities if page.document), {})

    @property
    def connected(self) -> frozenset[str]:
        """The nodes that follow the trust stream of a replica."""
        return frozenset(node for page in self.authorities for node in page.document.get("nodes") or ())

    def problems(self) -> Iterator[StatusProblem]:
        for kind, pages in (("authority", self.authorities), ("node driver", self.nodes)):
            if not pages:
                yield StatusProblem(kind, "has no pods")
            for page in pages:
                for problem in (page.error, *(page.document.get("problems") or ())):
                    if problem:
                        yield StatusProblem(f"{kind} {page.pod}", problem)
        for issuer in self.authority.get("issuers") or ():
            if issuer["problem"]:
                yield StatusProblem(f"issuer {issuer['name']}", issuer["problem"])
        for page in self.nodes if self.authority else ():
            if page.document and page.pod.node not in self.connected:
                yield StatusProblem(f"node driver {page.pod}", "is not connected to the authority")
        for each in self.certificates:
            if each["condition"]:
                where = f"pod {each['namespace']}/{each['pod']} volume {each['volume']} on {each['node']}"
                yield StatusProblem(where, each["condition"]["message"])

    def document(self) -> dict[str, Any]:
        """Return the JSON output."""
        authority = self.authority
        return {
            "problems": [{"subject": each.subject, "problem": each.problem} for each in self.problems()],
            "authorities": [{**_pod(page), "policy": page.document.get("policy")} for page in self.authorities],
            "ca": authority.get("ca"),
            "issuers": authority.get("issuers") or [],
            "rootSets": authority.get("rootSets") or [],
            "nodes": [
                {
                    **_pod(page),
                    "connected": page.pod.node in self.connected,
                    "certificates": len(page.document.get("certificates") or ()),
                }
                for page in self.nodes
            ],
            "certificates": list(self.certificates),
        }


async def read_installation_status(
    installation: Installation, selected: Callable[[Mapping[str, Any]], bool]
) -> InstallationStatus:
    """Read all pages; keep only the selected certificates. Raises NotChecked."""
    programs = (installation.pages(program, STATUS) for program in (AUTHORITY, NODE))
    authorities, nodes = await asyncio.gather(*programs)
    found = (each for page in nodes for each in page.document.get("certificates") or () if selected(each))
    order = sorted(found, key=lambda each: (not each["condition"], each["namespace"], each["pod"], each["volume"]))
    return InstallationStatus(authorities, nodes, order)


def _pod(page: ProgramPage) -> dict[str, Any]:
    version: str | None = page.document.get("version")
    problems: Sequence[str] = [page.error] if page.error else page.document.get("problems") or []
    return {
        "node": page.pod.node,
        "pod": page.pod.name,
        "ready": page.pod.ready,
        "version": version,
        "problems": problems,
    }
