"""What goes over the wire to the kubelet is held by a table, so that an accidental renumbering fails here."""

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
        stream = "stream " if method.server_streaming else ""
        assert not method.client_streaming
        yield f"/{scope}.{service.name}/{method.name} {method.input_type[1:]} -> {stream}{method.output_type[1:]}"


def facts(file: FileDescriptor) -> list[str]:
    """Every fact of a proto file that another program depends on, one a line."""
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
def test_the_wire_is_what_the_table_says(name: str) -> None:
    """Names, numbers and types of every method, field and enum value stay what the other side expects."""
    module: Any = MODULES[name]
    assert facts(module.DESCRIPTOR) == table()[name]


@pytest.mark.parametrize("field", ["secrets", "volume_context"])
def test_fields_that_carry_tokens_are_marked(field: str) -> None:
    """What may hold a pod's token says so in the descriptor, so that a generic log interceptor can tell."""
    options = csi_pb2.NodePublishVolumeRequest.DESCRIPTOR.fields_by_name[field].GetOptions()
    assert options.Extensions[csi_pb2.csi_secret]


def test_a_message_of_another_implementation_reads_back() -> None:
    """Bytes as a kubelet writes them, field by field, mean what they should."""
    wire = bytes.fromhex("0a03637369 220774617267657430 2a021200 3001 42060a0161120162")
    request = csi_pb2.NodePublishVolumeRequest.FromString(wire)
    assert request.volume_id == "csi"
    assert request.target_path == "target0"
    assert request.volume_capability.WhichOneof("access_type") == "mount"
    assert request.readonly
    assert dict(request.volume_context) == {"a": "b"}
