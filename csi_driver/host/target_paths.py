"""Is the kubelet's folder what the driver thinks it is, and may this target be mounted on?

Every folder above a target belongs to the kubelet and can't be exchanged by a pod, so plain path checks hold.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from csi_driver import DRIVER_NAME
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host.mountinfo import MountEntry, find_mount, mount_id

_FIELD: Final = "target_path"
_OPTION: Final = "--kubelet-dir"
_POD_UID: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
_LONGEST_PATH: Final = 4095  # PATH_MAX and NAME_MAX of limits.h, without the final NUL
_LONGEST_NAME: Final = 255
_MADE_BY_KUBELET: Final = ("plugins_registry", "pods")
_KINDS: Final = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISREG, "a file"))


def check_target(kubelet_dir: Path, target: str, pod_uid: str) -> Path:
    """The target as a path, which may not exist yet; costs two stat calls. Raises CertmountError:

    INVALID_REQUEST for text that is no absolute, normalised path or no pod UID, INVALID_KUBELET_DIRECTORY for a path below
    another kubelet's root, INVALID_TARGET_PATH for another pod's folder, a missing parent, or anything there but a folder.
    """
    if not _POD_UID.fullmatch(pod_uid):
        raise CertmountError(Reason.INVALID_REQUEST, Fault("csi.storage.k8s.io/pod.uid", f"{pod_uid!r} is no pod UID"))
    absolute = target.startswith("/") and not target.startswith("//")  # POSIX lets two mean another root
    if not absolute or not target.isprintable() or os.path.normpath(target) != target:
        problem = f"{target!r} is not an absolute path without '.', '..' and doubled slashes"
        raise CertmountError(Reason.INVALID_REQUEST, Fault(_FIELD, problem))
    if not target.startswith(f"{kubelet_dir}/"):
        raise _elsewhere(kubelet_dir, target)
    volumes = kubelet_dir / "pods" / pod_uid / "volumes"
    if not target.startswith(f"{volumes}/"):
        raise _unusable(f"{target} is not below {volumes}/", "a volume is mounted in its own pod's folder only")
    path = Path(target)
    _check_place(kubelet_dir, path)
    return path


def may_be_target(kubelet_dir: Path, text: str) -> bool:
    """False for text that :func:`check_target` never lets a volume be mounted at, so nothing of ours can be there."""
    name = os.fsencode(text)
    fits = len(name) <= _LONGEST_PATH and all(len(part) <= _LONGEST_NAME for part in name.split(b"/"))
    return fits and b"\0" not in name and text.startswith(f"{kubelet_dir}/pods/") and os.path.normpath(text) == text


def check_kubelet_dir(path: Path, *, shared: bool = True) -> None:
    """Refuses a wrong kubelet directory at start, all faults at once (INVALID_KUBELET_DIRECTORY).

    ``shared``: pods must see mounts made here, so its mount must spread them; needless where links stand in for mounts.
    """
    faults = []
    if not path.is_absolute() or not path.is_dir():
        faults.append(
            Fault(_OPTION, f"there is no folder {path}", "it is the kubelet's --root-dir, mounted at the same path")
        )
    else:
        missing = [name for name in _MADE_BY_KUBELET if not (path / name).is_dir()]
        if missing:
            problem = f"{path} has no {' and no '.join(missing)}, which every kubelet makes"
            faults.append(Fault(_OPTION, problem, "give the kubelet's --root-dir"))
        if shared and not _is_shared(path):
            problem = f"{path} is not mounted with shared propagation, so no pod would see a mount made there"
            faults.append(Fault(_OPTION, problem, "set mountPropagation: Bidirectional on its volumeMount"))
    if faults:
        raise CertmountError(Reason.INVALID_KUBELET_DIRECTORY, *faults)


def _check_place(kubelet_dir: Path, path: Path) -> None:
    try:
        if not path.parent.is_dir():
            hint = f"is {kubelet_dir} of the host mounted at the same path in the driver's container?"
            raise _unusable(f"its folder {path.parent} does not exist, though the kubelet makes it first", hint)
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(f"{path}: {os.strerror(error.errno or 0)}") from error
    if stat.S_ISDIR(found.st_mode) or _is_stand_in(kubelet_dir, path):
        return
    kind = next((words for matches, words in _KINDS if matches(found.st_mode)), "something other than a folder")
    raise _unusable(f"{kind} is at {path}", "remove it from the node; the kubelet then tries again")


def _is_stand_in(kubelet_dir: Path, path: Path) -> bool:
    # FolderMounts leaves a link into our own folder; KernelMounts refuses that one later, as it mounts on folders only.
    return path.is_symlink() and str(path.readlink()).startswith(f"{kubelet_dir}/plugins/{DRIVER_NAME}/")


def _elsewhere(kubelet_dir: Path, target: str) -> CertmountError:
    root, pods, _ = target.partition("/pods/")
    hint = (
        f"set {_OPTION} to {root}, and mount that host path" if pods and root else "set it to the kubelet's --root-dir"
    )
    problem = f"is {kubelet_dir}, but the kubelet asks for a mount at {target}"
    return CertmountError(Reason.INVALID_KUBELET_DIRECTORY, Fault(_OPTION, problem, hint))


def _unusable(problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.INVALID_TARGET_PATH, Fault(_FIELD, problem, hint))


def _is_shared(path: Path) -> bool:
    mount = _mount_of(path)
    return mount is not None and any(field.startswith("shared:") for field in mount.propagation)


def _mount_of(path: Path) -> MountEntry | None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        wanted = mount_id(descriptor)
    finally:
        os.close(descriptor)
    return find_mount(wanted)
