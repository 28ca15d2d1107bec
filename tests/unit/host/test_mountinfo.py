"""Parsing the kernel's mount table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.host.mountinfo import MountEntry, find_mount, mount_id, parse_mount, read_mounts

LINE = b"36 35 98:0 /files /mnt/pods/a ro,nosuid,relatime shared:7 master:3 - tmpfs certmount rw,size=1024k,mode=700\n"
MOUNT = MountEntry(
    id=36,
    parent=35,
    device="98:0",
    root="/files",
    point="/mnt/pods/a",
    options=frozenset({"ro", "nosuid", "relatime"}),
    propagation=("shared:7", "master:3"),
    fs_type="tmpfs",
    source="certmount",
    super_options=frozenset({"rw", "size=1024k", "mode=700"}),
)
ESCAPED = {0o40: b"\\040", 0o11: b"\\011", 0o12: b"\\012", 0o134: b"\\134", 0o43: b"\\043"}
paths = st.binary(max_size=80).map(lambda raw: b"/" + raw.replace(b"\0", b""))


def escape(raw: bytes) -> bytes:
    """Escape a path as the kernel does, proc_pid_mountinfo(5)."""
    return b"".join(ESCAPED.get(byte, bytes([byte])) for byte in raw)


def test_all_fields_of_a_line_are_parsed() -> None:
    assert parse_mount(LINE) == MOUNT


def test_line_without_optional_fields_and_with_empty_source_is_parsed() -> None:
    mount = parse_mount(b"22 27 0:21 / /proc rw - proc  rw\n")
    assert mount is not None
    assert (mount.propagation, mount.source, mount.fs_type) == ((), "", "proc")


@given(point=paths, source=st.binary(max_size=20).map(lambda raw: raw.replace(b"\0", b"")))
def test_escaped_paths_are_decoded(point: bytes, source: bytes) -> None:
    line = b"1 0 0:5 / " + escape(point) + b" rw shared:1 - tmpfs " + escape(source) + b" rw\n"
    mount = parse_mount(line)
    assert mount is not None
    assert os.fsencode(mount.point) == point
    assert os.fsencode(mount.source) == source


@given(st.binary(max_size=200))
def test_any_line_is_parsed_without_exception(line: bytes) -> None:
    parse_mount(line)


@given(st.integers(0, len(LINE) - 1))
def test_truncated_line_is_never_another_mount(length: int) -> None:
    mount = parse_mount(LINE[:length])
    assert mount is None or (mount.id, mount.point, mount.source) == (MOUNT.id, MOUNT.point, MOUNT.source)


@pytest.mark.parametrize("line", [b"", b"\n", b"x 1 0:1 / / rw - a b c", b"1 2 0:1 / / rw a b c", b"1 2 0:1 / - a b c"])
def test_malformed_lines_are_skipped(tmp_path: Path, line: bytes) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(LINE + line + b"\n" + LINE.replace(b"36 ", b"37 ", 1))
    assert [mount.id for mount in read_mounts(table)] == [36, 37]
    assert find_mount(37, table) is not None
    assert find_mount(3, table) is None


def test_mount_of_an_open_directory_is_found() -> None:
    descriptor = os.open("/proc", os.O_PATH)
    try:
        mount = find_mount(mount_id(descriptor))
    finally:
        os.close(descriptor)
    assert mount is not None
    assert (mount.point, mount.fs_type) == ("/proc", "proc")
