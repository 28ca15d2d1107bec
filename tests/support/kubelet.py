"""A kubelet for a running driver: pod directories, tokens, and calls over the unix socket."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import jwt

from csi_driver import DRIVER_NAME, POD_AUDIENCE
from csi_driver._proto import csi_pb2, csi_pb2_grpc, registration_pb2, registration_pb2_grpc

_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
_REGISTRATION_S = 20.0
_TOKEN_KEY = secrets.token_bytes(32)  # signs tokens that only a scripted authority accepts


@dataclass(frozen=True)
class FakePod:
    """A pod on this node."""

    namespace: str = "web"
    name: str = "shop"
    service_account: str = "shop"
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))

    def claims(self, **changes: object) -> dict[str, object]:
        now = int(time.time())
        return {
            "iss": "https://kubernetes.default.svc.cluster.local",
            "aud": [POD_AUDIENCE],
            "sub": f"system:serviceaccount:{self.namespace}:{self.service_account}",
            "exp": now + 3600,
            "iat": now,
            "jti": str(uuid.uuid4()),
            "kubernetes.io": {
                "namespace": self.namespace,
                "node": {"name": "node1", "uid": "node1-uid"},
                "pod": {"name": self.name, "uid": self.uid},
                "serviceaccount": {"name": self.service_account, "uid": f"{self.service_account}-uid"},
            },
        } | changes

    def token(self, **changes: object) -> str:
        return jwt.encode(self.claims(**changes), _TOKEN_KEY, algorithm="HS256")


class Kubelet:
    """Creates a kubelet directory and calls the driver that uses it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("pods", "plugins", "plugins_registry"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.socket = root / "plugins" / DRIVER_NAME / "csi.sock"
        self.registration_socket = root / "plugins_registry" / f"{DRIVER_NAME}-reg.sock"

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"unix:{self.socket}", options=_OWN_CONNECTION)

    async def register(self, error: str = "") -> registration_pb2.PluginInfo:
        """Register the driver like the kubelet's plugin watcher, or report an error to it."""
        async with grpc.aio.insecure_channel(f"unix:{self.registration_socket}", options=_OWN_CONNECTION) as channel:
            stub: registration_pb2_grpc.RegistrationAsyncStub = registration_pb2_grpc.RegistrationStub(channel)
            info = await stub.GetInfo(registration_pb2.InfoRequest(), wait_for_ready=True, timeout=_REGISTRATION_S)
            status = registration_pb2.RegistrationStatus(plugin_registered=not error, error=error)
            await stub.NotifyRegistrationStatus(status, timeout=_REGISTRATION_S)
        return info

    def target(self, pod: FakePod, volume: str = "tls") -> Path:
        """Return the target path of a volume and create its parent, like the kubelet."""
        target = self.root / "pods" / pod.uid / "volumes" / "kubernetes.io~csi" / volume / "mount"
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def publish_request(
        self,
        pod: FakePod,
        attributes: Mapping[str, str] | None = None,
        *,
        volume_id: str | None = None,
        token: str | None = "",
        tokens_in_secrets: bool = False,
        fs_group: str = "",
        read_only: bool = True,
    ) -> csi_pb2.NodePublishVolumeRequest:
        """Return a call of the kubelet. If ``token`` is None, it has no token; if empty, a new one."""
        tokens = {}
        if token is not None:
            entry = {"token": token or pod.token(), "expirationTimestamp": "2030-01-01T00:00:00Z"}
            tokens = {"csi.storage.k8s.io/serviceAccount.tokens": json.dumps({POD_AUDIENCE: entry})}
        context = {
            **(attributes or {}),
            "csi.storage.k8s.io/pod.name": pod.name,
            "csi.storage.k8s.io/pod.namespace": pod.namespace,
            "csi.storage.k8s.io/pod.uid": pod.uid,
            "csi.storage.k8s.io/serviceAccount.name": pod.service_account,
            "csi.storage.k8s.io/ephemeral": "true",
            **({} if tokens_in_secrets else tokens),
        }
        mode = csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
        mount = csi_pb2.VolumeCapability.MountVolume(volume_mount_group=fs_group)
        return csi_pb2.NodePublishVolumeRequest(
            volume_id=volume_id or f"csi-{pod.uid.replace('-', '')}",
            target_path=str(self.target(pod)),
            volume_capability=csi_pb2.VolumeCapability(mount=mount, access_mode=mode),
            readonly=read_only,
            secrets=tokens if tokens_in_secrets else {},
            volume_context=context,
        )

    @staticmethod
    def unpublish_request(published: csi_pb2.NodePublishVolumeRequest) -> csi_pb2.NodeUnpublishVolumeRequest:
        return csi_pb2.NodeUnpublishVolumeRequest(volume_id=published.volume_id, target_path=published.target_path)


def node_stub(channel: grpc.aio.Channel) -> csi_pb2_grpc.NodeAsyncStub:
    return csi_pb2_grpc.NodeStub(channel)


def identity_stub(channel: grpc.aio.Channel) -> csi_pb2_grpc.IdentityAsyncStub:
    return csi_pb2_grpc.IdentityStub(channel)
