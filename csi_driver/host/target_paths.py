"""Check the kubelet directory and the target paths of volumes.

All directories above a target path belong to the kubelet and no pod can replace them, so path checks are sufficient.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from csi_driver import DRIVER_NAME
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host.directories import open_descriptor
from csi_driver.host.mountinfo import find_mount, mount_id

_FIELD: Final = "target_path"
_OPTION: Final = "--kubelet-dir"
_POD_UID: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
_MAX_PATH_BYTES: Final = 4095  # PATH_MAX and NAME_MAX of limits.h, without the final NUL
_MAX_NAME_BYTES: Final = 255
_CREATED_BY_KUBELET: Final = ("plugins_registry", "pods")


def check_target(kubelet_dir: Path, target: str, pod_uid: str) -> Path:
    """Return the target path, which need not exist. Costs two stat calls.

    Raises CertmountError: INVALID_REQUEST if the path is not absolute and normalized or the pod UID is invalid,
    INVALID_KUBELET_DIRECTORY if the path is outside the kubelet directory, INVALID_TARGET_PATH if it is in another
    pod's directory, has no parent directory, or is not a directory.
    """
    if not _POD_UID.fullmatch(pod_uid):
        raise CertmountError(
            Reason.INVALID_REQUEST, Fault("csi.storage.k8s.io/pod.uid", f"{pod_uid!r} is not a pod UID")
        )
    absolute = target.startswith("/") and not target.startswith("//")  # POSIX: "//" can be another root
    if not absolute or not target.isprintable() or os.path.normpath(target) != target:
        problem = f"{target!r} is not an absolute path without '.', '..', '//' and control characters"
        raise CertmountError(Reason.INVALID_REQUEST, Fault(_FIELD, problem))
    if not target.startswith(f"{kubelet_dir}/"):
        raise _wrong_kubelet_dir(kubelet_dir, target)
    volumes = kubelet_dir / "pods" / pod_uid / "volumes"
    if not target.startswith(f"{volumes}/"):
        raise _invalid(f"{target} is not in {volumes}", "a volume can be mounted only in the directory of its own pod")
    path = Path(target)
    _check_existing(kubelet_dir, path)
    return path


def may_be_target(kubelet_dir: Path, text: str) -> bool:
    """Return False if :func:`check_target` rejects the text in any case: no volume can be mounted there."""
    name = os.fsencode(text)
    fits = len(name) <= _MAX_PATH_BYTES and all(len(part) <= _MAX_NAME_BYTES for part in name.split(b"/"))
    return fits and b"\0" not in name and text.startswith(f"{kubelet_dir}/pods/") and os.path.normpath(text) == text


def check_kubelet_dir(path: Path, *, shared: bool = True) -> None:
    """Raise CertmountError INVALID_KUBELET_DIRECTORY with all faults if this is not the kubelet's directory.

    ``shared``: require shared mount propagation, without which no pod sees the driver's mounts. DirectoryMounts does not
    need it.
    """
    faults = []
    if not path.is_absolute() or not path.is_dir():
        hint = "set it to the kubelet's --root-dir, mounted at the same path in the driver's container"
        faults.append(Fault(_OPTION, f"the directory {path} does not exist", hint))
    else:
        missing = [name for name in _CREATED_BY_KUBELET if not (path / name).is_dir()]
        if missing:
            problem = f"{path} does not contain {' and '.join(missing)}, which every kubelet creates"
            faults.append(Fault(_OPTION, problem, "set it to the kubelet's --root-dir"))
        if shared and not _is_shared(path):
            problem = f"{path} is not mounted with shared propagation, so pods do not see mounts in it"
            faults.append(Fault(_OPTION, problem, "set mountPropagation: Bidirectional on its volumeMount"))
    if faults:
        raise CertmountError(Reason.INVALID_KUBELET_DIRECTORY, *faults)


def _check_existing(kubelet_dir: Path, path: Path) -> None:
    parent_exists = False
    try:
        # Not Path.is_dir, which returns False for errors that depend on the Python version.
        with suppress(FileNotFoundError, NotADirectoryError):
            parent_exists = stat.S_ISDIR(path.parent.stat().st_mode)
        if not parent_exists:
            hint = f"mount {kubelet_dir} of the host at the same path in the driver's container"
            raise _invalid(f"the directory {path.parent} does not exist, although the kubelet creates it", hint)
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _invalid(f"{path}: {os.strerror(error.errno or 0)}") from error
    # DirectoryMounts leaves a link to our own directory. KernelMounts rejects such a link later.
    own_link = stat.S_ISLNK(mode) and str(path.readlink()).startswith(f"{kubelet_dir}/plugins/{DRIVER_NAME}/")
    if not stat.S_ISDIR(mode) and not own_link:
        raise _invalid(f"{path} is not a directory", "remove it from the node; the kubelet then retries")


def _wrong_kubelet_dir(kubelet_dir: Path, target: str) -> CertmountError:
    root, pods, _ = target.partition("/pods/")
    expected = f"{root}, and mount that host path" if pods and root else "the kubelet's --root-dir"
    problem = f"is {kubelet_dir}, but the kubelet's target path is {target}"
    return CertmountError(Reason.INVALID_KUBELET_DIRECTORY, Fault(_OPTION, problem, f"set {_OPTION} to {expected}"))


def _invalid(problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.INVALID_TARGET_PATH, Fault(_FIELD, problem, hint))


def _is_shared(path: Path) -> bool:
    with open_descriptor(path, os.O_PATH) as descriptor:
        mount = find_mount(mount_id(descriptor))
    return mount is not None and any(field.startswith("shared:") for field in mount.propagation)
