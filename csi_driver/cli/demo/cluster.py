"""Simulates the cluster: the API server's token issuer, and the kubelet of its only node."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from csi_driver import DRIVER_NAME, POD_AUDIENCE
from csi_driver._proto import csi_pb2, csi_pb2_grpc, registration_pb2, registration_pb2_grpc
from csi_driver.cli.demo.output import DemoError
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.secret import Secret

NODE = "demo-node"
ISSUER = "https://demo.certmount.invalid"
_TOKEN_LIFETIME_S = 3600
_ALGORITHM = "ES256"
_CALL_TIMEOUT_S = 30.0
# The driver creates its socket when it starts, so reconnect often.
_OPTIONS = tuple((f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("initial", "min", "max"))


@dataclass(frozen=True, slots=True)
class DemoPod:
    """A pod with a new UID, and the ID of its volume."""

    account: ServiceAccount
    name: str
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    volume_id: str = field(default_factory=lambda: f"csi-{secrets.token_hex(32)}")

    def __str__(self) -> str:
        return f"{self.account.namespace}/{self.name}"


class DemoTokenIssuer:
    """Signs service account tokens with a key that exists only in memory."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._key_id = key_fingerprint(self._key.public_key())[:16]

    def key_set(self) -> str:
        """Return the public key as a JSON Web Key Set (RFC 7517)."""
        key = ECAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return json.dumps({"keys": [{**key, "kid": self._key_id, "alg": _ALGORITHM, "use": "sig"}]})

    def issue(self, pod: DemoPod, audience: str) -> Secret[str]:
        """Return a token for one audience, with the claims that Kubernetes writes since 1.32 (KEP-4193)."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": [audience],
            "sub": pod.account.username,
            "iat": now,
            "nbf": now,
            "exp": now + _TOKEN_LIFETIME_S,
            "jti": str(uuid.uuid4()),
            "kubernetes.io": {
                "namespace": pod.account.namespace,
                "node": {"name": NODE, "uid": _uid(NODE)},
                "pod": {"name": pod.name, "uid": pod.uid},
                "serviceaccount": {"name": pod.account.name, "uid": _uid(str(pod.account))},
            },
        }
        return Secret(jwt.encode(claims, self._key, algorithm=_ALGORITHM, headers={"kid": self._key_id}))


def _uid(name: str) -> str:
    """Return the same UID for the same name: nodes and service accounts keep theirs across tokens."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{ISSUER}/{name}"))


class PublishError(Exception):
    """The driver did not publish a volume. The message is the text of the pod event."""


class DemoKubelet:
    """Registers the driver, publishes and unpublishes volumes. Creates its root directory."""

    def __init__(self, root: Path, tokens: DemoTokenIssuer) -> None:
        self.root = root
        self._tokens = tokens
        for name in ("pods", "plugins", "plugins_registry"):
            (root / name).mkdir(parents=True)
        plugin, registration = root / "plugins" / DRIVER_NAME, root / "plugins_registry" / f"{DRIVER_NAME}-reg.sock"
        self._volumes = plugin / "volumes"
        self._channels = [
            grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS)
            for socket in (registration, plugin / "csi.sock")
        ]
        self._node: csi_pb2_grpc.NodeAsyncStub = csi_pb2_grpc.NodeStub(self._channels[1])

    async def register(self) -> str:
        """Wait for the driver and register it; return its node ID."""
        stub: registration_pb2_grpc.RegistrationAsyncStub = registration_pb2_grpc.RegistrationStub(self._channels[0])
        with _failures_of("registering the driver"):
            await stub.GetInfo(registration_pb2.InfoRequest(), timeout=_CALL_TIMEOUT_S, wait_for_ready=True)
            request = csi_pb2.NodeGetInfoRequest()
            node = await self._node.NodeGetInfo(request, timeout=_CALL_TIMEOUT_S, wait_for_ready=True)
            status = registration_pb2.RegistrationStatus(plugin_registered=True)
            await stub.NotifyRegistrationStatus(status, timeout=_CALL_TIMEOUT_S)
        return node.node_id

    def target(self, pod: DemoPod) -> Path:
        """Return the directory of the pod's volume."""
        return self.root / "pods" / pod.uid / "volumes" / "kubernetes.io~csi" / "tls" / "mount"

    async def publish(self, name: str, attributes: Mapping[str, str]) -> DemoPod:
        """Publish the volume of a new pod in namespace web, whose fsGroup is this process's group. Raises PublishError."""
        pod = DemoPod(ServiceAccount("web", name), name)
        self.target(pod).parent.mkdir(parents=True)
        try:
            await self._node.NodePublishVolume(self._request(pod, attributes), timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            # Like the kubelet: a failed call may have left a partly published volume.
            await self.unpublish(pod)
            raise PublishError(error.details() or error.code().name) from None
        return pod

    async def unpublish(self, pod: DemoPod) -> None:
        """Unpublish the volume and delete the pod's directory."""
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=pod.volume_id, target_path=str(self.target(pod)))
        with _failures_of(f"unpublishing the volume of pod {pod}"):
            await self._node.NodeUnpublishVolume(request, timeout=_CALL_TIMEOUT_S)
        shutil.rmtree(self.root / "pods" / pod.uid)

    def leftovers(self) -> list[Path]:
        """Return what the driver still stores for any volume."""
        return sorted(self._volumes.iterdir())

    async def aclose(self) -> None:
        for channel in self._channels:
            await channel.close()

    def _request(self, pod: DemoPod, attributes: Mapping[str, str]) -> csi_pb2.NodePublishVolumeRequest:
        prefix = "csi.storage.k8s.io/"
        token = {"token": self._tokens.issue(pod, POD_AUDIENCE).reveal()}
        access = csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
        mount = csi_pb2.VolumeCapability.MountVolume(volume_mount_group=str(os.getegid()))
        return csi_pb2.NodePublishVolumeRequest(
            volume_id=pod.volume_id,
            target_path=str(self.target(pod)),
            volume_capability=csi_pb2.VolumeCapability(mount=mount, access_mode=access),
            readonly=True,
            secrets={f"{prefix}serviceAccount.tokens": json.dumps({POD_AUDIENCE: token})},
            volume_context={
                **attributes,
                f"{prefix}pod.name": pod.name,
                f"{prefix}pod.namespace": pod.account.namespace,
                f"{prefix}pod.uid": pod.uid,
                f"{prefix}serviceAccount.name": pod.account.name,
                f"{prefix}ephemeral": "true",
            },
        )


@contextmanager
def _failures_of(operation: str) -> Iterator[None]:
    """Turn the error of a call that must succeed into a DemoError with the driver's message."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise DemoError(f"{operation}: {error.details() or error.code().name}") from None
