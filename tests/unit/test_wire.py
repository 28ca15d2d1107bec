"""A table contains the wire format, so that an accidental change of a number fails a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor

from csi_driver._proto import authority_pb2, csi_pb2, registration_pb2

TABLE = Path(__file__).with_name("wire.txt")
MODULES = {"csi": csi_pb2, "registration": registration_pb2, "authority": authority_pb2}
FIELD = descriptor_pb2.FieldDescriptorProto


def message_facts(scope: str, message: descriptor_pb2.DescriptorProto) -> Iterator[str]:
    name = f"{scope}.{message.name}"
    for field in message.field:
        label = "repeated " if field.label == FIELD.LABEL_REPEATED else ""
        kind = field.type_name.lstrip(".") or FIELD.Type.Name(field.type).removeprefix("TYPE_").lower()
        oneof = f" in {message.oneof_decl[field.oneof_index].name}" if field.HasField("oneof_index") else ""
        yield f"{name} {field.number} {field.name}: {label}{kind}{oneof}"
    if not message.field and not message.options.map_entry:
        yield f"{name} is empty"
    for reserved in message.reserved_range:
        yield f"{name} reserved {reserved.start}"
    for nested in message.nested_type:
        yield from message_facts(name, nested)
    for enum in message.enum_type:
        yield from enum_facts(name, enum)


def enum_facts(scope: str, enum: descriptor_pb2.EnumDescriptorProto) -> Iterator[str]:
    for value in enum.value:
        yield f"{scope}.{enum.name} {value.number} = {value.name}"
    for reserved in enum.reserved_range:
        yield f"{scope}.{enum.name} reserved {reserved.start}"


def service_facts(scope: str, service: descriptor_pb2.ServiceDescriptorProto) -> Iterator[str]:
    for method in service.method:
        requests = "stream " if method.client_streaming else ""
        responses = "stream " if method.server_streaming else ""
        types = f"{requests}{method.input_type[1:]} -> {responses}{method.output_type[1:]}"
        yield f"/{scope}.{service.name}/{method.name} {types}"


def facts(file: FileDescriptor) -> list[str]:
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    lines: list[str] = []
    for service in proto.service:
        lines += service_facts(proto.package, service)
    for message in proto.message_type:
        lines += message_facts(proto.package, message)
    for enum in proto.enum_type:
        lines += enum_facts(proto.package, enum)
    return sorted(lines)


def table() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    section: list[str] = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            section.append(line)
    return sections


@pytest.mark.parametrize("name", MODULES)
def test_wire_format_matches_the_table(name: str) -> None:
    module: Any = MODULES[name]
    assert facts(module.DESCRIPTOR) == table()[name]


@pytest.mark.parametrize("field", ["secrets", "volume_context"])
def test_fields_with_tokens_are_marked_as_secrets(field: str) -> None:
    """A generic log interceptor can then redact them."""
    options = csi_pb2.NodePublishVolumeRequest.DESCRIPTOR.fields_by_name[field].GetOptions()
    assert options.Extensions[csi_pb2.csi_secret]


def test_message_of_a_kubelet_is_parsed() -> None:
    wire = bytes.fromhex("0a03637369 220774617267657430 2a021200 3001 42060a0161120162")
    request = csi_pb2.NodePublishVolumeRequest.FromString(wire)
    assert request.volume_id == "csi"
    assert request.target_path == "target0"
    assert request.volume_capability.WhichOneof("access_type") == "mount"
    assert request.readonly
    assert dict(request.volume_context) == {"a": "b"}
