"""Runs ``csiclient``, a Go program that publishes volumes like the kubelet: its time is not part of the driver's figures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from csi_driver._proto import csi_pb2
from tests.bench.go_programs import build_go_program
from tests.bench.world import PublishRequest, WrongResultError
from tests.support.kubelet import Kubelet


@dataclass(frozen=True, slots=True)
class ClientResult:
    """What a client measured. The seconds of the calls are in the order of the requests."""

    seconds: float  # until the last response
    processor_s: float
    publish_s: Sequence[float]
    unpublish_s: Sequence[float]
    errors: Sequence[str]

    def succeeded(self) -> ClientResult:
        if self.errors:
            raise WrongResultError(f"{len(self.errors)} calls failed, one with: {self.errors[0]}")
        return self


@dataclass(slots=True)
class RunningClient:
    """A client that has started to send calls."""

    _process: asyncio.subprocess.Process

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def result(self) -> ClientResult:
        """Start no more volumes, wait for the calls in progress, and return what was measured."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        output, _ = await self._process.communicate()
        if self._process.returncode:
            raise WrongResultError("csiclient failed")
        found = json.loads(output)
        volumes = found["volumes"]
        return ClientResult(
            found["seconds"],
            found["processor_s"],
            [volume["publish_s"] for volume in volumes],
            [volume["unpublish_s"] for volume in volumes],
            [volume["error"] for volume in volumes if volume["error"]],
        )


@dataclass(frozen=True, slots=True)
class KubeletClient:
    """Calls the driver of a kubelet directory."""

    program: Path
    directory: Path  # for files of requests
    kubelet: Kubelet

    async def run(self, requests: Sequence[PublishRequest], *options: str, unpublish: bool = True) -> ClientResult:
        """Publish volumes, and wait for the end. ``options`` are those of the program."""
        async with self.started(requests, *options, unpublish=unpublish) as client:
            return await client.result()

    @asynccontextmanager
    async def started(
        self, requests: Sequence[PublishRequest], *options: str, unpublish: bool = True
    ) -> AsyncIterator[RunningClient]:
        """Start to publish volumes. With ``unpublish``, each volume is unpublished after it was published."""
        file = self.directory / f"requests-{id(requests)}"
        file.write_bytes(b"".join(_encoded(request, unpublish=unpublish) for request in requests))
        command, pipe = (
            [str(self.program), f"-socket={self.kubelet.socket}", f"-requests={file}"],
            asyncio.subprocess.PIPE,
        )
        process = await asyncio.create_subprocess_exec(*command, *options, stdin=pipe, stdout=pipe, limit=1 << 26)
        try:
            assert process.stdout is not None
            if await process.stdout.readline() != b"started\n":
                raise WrongResultError("csiclient did not start")
            yield RunningClient(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            file.unlink()


def _encoded(request: PublishRequest, *, unpublish: bool) -> bytes:
    removal = Kubelet.unpublish_request(request) if unpublish else csi_pb2.NodeUnpublishVolumeRequest()
    messages = (request.SerializeToString(), removal.SerializeToString())
    return b"".join(len(message).to_bytes(4) + message for message in messages)


async def build_kubelet_client(directory: Path, kubelet: Kubelet) -> KubeletClient | None:
    """Return a client, or None without Go."""
    program = await build_go_program("csiclient")
    return None if program is None else KubeletClient(program, directory, kubelet)
