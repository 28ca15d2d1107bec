"""Values for the tests of the host package."""

from __future__ import annotations

from csi_driver.core.secret import Secret
from csi_driver.host.generations import VolumeFile
from csi_driver.host.volume_record import VolumeRecord

VOLUME_ID = "csi-" + "5a" * 32
POD_UID = "0b7a3c5e-6d0f-4e57-9d7a-0c9f1f6d2a11"


def files(**contents: str) -> list[VolumeFile]:
    """Return files: ``site_crt="x"`` becomes ``site.crt`` with content x."""
    return [VolumeFile(name.replace("_", "."), Secret(text.encode()), 0o644, None) for name, text in contents.items()]


def pair(number: int, size: int = 1) -> list[VolumeFile]:
    """Return a certificate and its key; they match if they contain the same number."""
    text = f"{number} " * size
    return files(site_crt=text, site_key=text)


def record(
    target: str = "/var/lib/kubelet/pods/uid/volumes/kubernetes.io~csi/tls/mount", **fields: object
) -> VolumeRecord:
    values: dict[str, object] = {
        "volume_id": VOLUME_ID,
        "pod_namespace": "default",
        "pod_name": "hello-0",
        "pod_uid": POD_UID,
        "service_account": "hello",
        "attributes": {"name": "hello.default.svc", "duration": "1h"},
        "mount_group": 2000,
        "targets": (target,),
        "issued_at": 1_800_000_000.5,
        "renew_at": 1_800_002_400.0,
        "not_after": 1_800_003_600.0,
        "interim": False,
    }
    return VolumeRecord(**(values | fields))  # type: ignore[arg-type]  # tests vary any field
