"""The objects of an installation, as ``certmount doctor`` reads them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from csi_driver.core.errors import CertmountError
from csi_driver.doctor.findings import NotChecked
from csi_driver.doctor.programs import (
    ProgramPage,
    ProgramPod,
    program_pages,
    program_pods,
)
from csi_driver.kube.admin.object_reader import ObjectReader
from csi_driver.kube.client import ApiError
from csi_driver.kube.metadata import Json

APPLY = "apply your kustomization or upgrade your Helm release again"


@dataclass(frozen=True, slots=True)
class Workload:
    """A Deployment or DaemonSet of certmount with one container."""

    item: Json

    @property
    def pod_spec(self) -> Json:
        return dict(self.item["spec"]["template"]["spec"])

    @property
    def container(self) -> Json:
        return dict(self.pod_spec["containers"][0])

    @property
    def account(self) -> str:
        return str(self.pod_spec.get("serviceAccountName") or "default")

    def flags(self, name: str) -> list[str]:
        """Return the values of an option of the command line, in their order. A value can be the next argument."""
        arguments = [str(each) for field in ("command", "args") for each in self.container.get(field) or ()]
        found = []
        for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
            option, equals, value = argument.partition("=")
            if option == f"--{name}":
                found.append(value if equals else following)
        return found

    def flag(self, name: str, default: str = "") -> str:
        """Return the value of an option; of several, the program uses the last."""
        return [default, *self.flags(name)][-1]

    @property
    def pod_signers(self) -> list[str]:
        """The signer names of Pod Certificates for which an authority signs."""
        return [value.partition("=")[0] for value in self.flags("pod-signer")]

    def environment(self, name: str) -> str:
        entries = self.container.get("env") or ()
        return next((str(each.get("value") or "") for each in entries if each["name"] == name), "")

    def config_map_of(self, path: str) -> tuple[str, str]:
        """Return the ConfigMap and the key that a path in the container shows; empty if it is no ConfigMap."""
        directory, _, key = path.rpartition("/")
        for mount in self.container.get("volumeMounts") or ():
            if mount["mountPath"].rstrip("/") == directory:
                volumes = {each["name"]: each for each in self.pod_spec.get("volumes") or ()}
                return str((volumes[mount["name"]].get("configMap") or {}).get("name") or ""), key
        return "", key


@dataclass(slots=True)
class Installation:
    """Reads each object and page once. What cannot be read raises NotChecked."""

    reader: ObjectReader
    namespace: str
    _reads: dict[str, asyncio.Task[Any]] = field(default_factory=dict)

    async def find(self, path: str) -> Json | None:
        """Return an object, or None if it does not exist."""

        async def read() -> Json | None:
            with checked(f"get {path}"):
                return await self.reader.find(path)

        found: Json | None = await self._once(path, read)
        return found

    async def workload(self, kind: str, name: str) -> Workload | None:
        item = await self.find(f"/apis/apps/v1/namespaces/{self.namespace}/{kind}/{name}")
        return Workload(item) if item else None

    async def pods(self, program: str) -> list[ProgramPod]:
        async def read() -> list[ProgramPod]:
            with checked(f"list pods in namespace {self.namespace}"):
                return await program_pods(self.reader, self.namespace, program)

        found: list[ProgramPod] = await self._once(f"pods of {program}", read)
        return found

    async def pages(self, program: str, path: str) -> list[ProgramPage]:
        """Return a page of each pod of a program, for example what it found when it checked what it needs."""

        async def read() -> list[ProgramPage]:
            pods = await self.pods(program)
            found = [page async for page in program_pages(self.reader, self.namespace, pods, path)]
            return sorted(found, key=lambda page: (page.pod.node, page.pod.name))

        found: list[ProgramPage] = await self._once(f"{path} of {program}", read)
        return found

    async def _once(self, key: str, read: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if key not in self._reads:
            self._reads[key] = asyncio.create_task(read())
        return await self._reads[key]

    async def config_map(self, name: str) -> Mapping[str, str] | None:
        item = await self.find(f"/api/v1/namespaces/{self.namespace}/configmaps/{name}")
        return None if item is None else {key: str(value) for key, value in (item.get("data") or {}).items()}


@contextlib.contextmanager
def checked(action: str) -> Iterator[None]:
    """Raise NotChecked if the action fails; a missing permission is what the administrator can change."""
    try:
        yield
    except CertmountError as error:
        status = error.status if isinstance(error, ApiError) else 0
        if status == 403:
            fix = "use a kubeconfig that has it, see docs/commands.md"
            raise NotChecked(f"you do not have the permission to {action}", fix) from None
        if status == 401:
            fix = "check your kubeconfig with: kubectl auth whoami"
            raise NotChecked("the API server rejects your credentials", fix) from None
        raise NotChecked(error.text, "retry; check the API server with: kubectl get --raw /readyz") from None


def merge_patch(kind: str, name: str, patch: str, namespace: str = "") -> str:
    """Return a kubectl command that changes an object."""
    where = f"-n {namespace} " if namespace else ""
    return f"kubectl {where}patch {kind} {name} --type=merge -p '{patch}'"


def first(found: Iterable[Any]) -> Any:
    return next(iter(found), None)
