"""The compiled contract equals the table of facts, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor, descriptor_pb2
from google.protobuf.internal import api_implementation

from dispatcher.cri import api_pb2

TABLE: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "cri_contract.json").read_text())
FILE = api_pb2.DESCRIPTOR
FieldFacts = dict[str, Any]

SCALARS = {
    getattr(descriptor.FieldDescriptor, f"TYPE_{name.upper()}"): name
    for name in ("double", "float", "int64", "uint64", "int32", "uint32", "bool", "string", "bytes")
}


def short(full_name: str) -> str:
    """Return a type's name as the table writes it: without the package, and without the enclosing message."""
    return full_name.rsplit(".", 1)[-1]


def type_of(field: descriptor.FieldDescriptor) -> str:
    """Return the type as the table writes it."""
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            return f"map<{type_of(entry['key'])}, {type_of(entry['value'])}>"
        return short(field.message_type.full_name)
    if field.enum_type is not None:
        return short(field.enum_type.full_name)
    return SCALARS[field.type]


def facts_of(field: descriptor.FieldDescriptor) -> FieldFacts:
    """Return a compiled field in the table's form, with keys for anything that the table does not know."""
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    facts: FieldFacts = {"name": field.name, "number": field.number, "type": type_of(field)}
    if field.is_repeated and not is_map:
        facts["repeated"] = True
    if field.is_required:
        facts["required"] = True
    if field.containing_oneof is not None:
        facts["oneof"] = field.containing_oneof.name
    options = field.GetOptions()
    facts.update({name: True for name in ("deprecated", "debug_redact") if getattr(options, name)})
    return facts


def values_of(enum: descriptor.EnumDescriptor) -> dict[str, int]:
    """Return names and numbers of an enumeration, aliases included."""
    return {value.name: value.number for value in enum.values}


def test_package_and_syntax() -> None:
    """Full method names on the wire begin with this package."""
    assert FILE.package == TABLE["package"]
    parsed = descriptor_pb2.FileDescriptorProto()
    FILE.CopyToProto(parsed)
    assert parsed.syntax == TABLE["syntax"]


def test_service_names() -> None:
    """There are the table's services and no others."""
    assert list(FILE.services_by_name) == list(TABLE["services"])


@pytest.mark.parametrize("service", TABLE["services"])
def test_rpcs(service: str) -> None:
    """Each service has the table's RPCs, with their messages and streaming flags, and no others."""
    compiled = [
        {
            "rpc": method.name,
            "request": short(method.input_type.full_name),
            "response": short(method.output_type.full_name),
        }
        | ({"client_streaming": True} if method.client_streaming else {})
        | ({"server_streaming": True} if method.server_streaming else {})
        for method in FILE.services_by_name[service].methods
    ]
    assert compiled == TABLE["services"][service]


def test_rpc_count() -> None:
    """The contract of this release has 43 RPCs."""
    assert sum(len(service.methods) for service in FILE.services_by_name.values()) == 43


def test_message_names() -> None:
    """There are the table's messages and no others."""
    assert set(FILE.message_types_by_name) == set(TABLE["messages"])


@pytest.mark.parametrize("message", TABLE["messages"])
def test_message(message: str) -> None:
    """Each message has the table's fields (name, number, type, label, options), nested enumerations, and no more."""
    compiled = FILE.message_types_by_name[message]
    expected = TABLE["messages"][message]
    by_number = sorted(expected["fields"], key=lambda field: field["number"])
    assert [facts_of(field) for field in sorted(compiled.fields, key=lambda field: field.number)] == by_number
    assert {enum.name: values_of(enum) for enum in compiled.enum_types} == expected.get("enums", {})
    assert [nested.name for nested in compiled.nested_types if not nested.GetOptions().map_entry] == []
    assert list(compiled.oneofs_by_name) == []


def test_enum_names() -> None:
    """There are the table's enumerations and no others."""
    assert set(FILE.enum_types_by_name) == set(TABLE["enums"])


@pytest.mark.parametrize("enum", TABLE["enums"])
def test_enum(enum: str) -> None:
    """Each enumeration has the table's names and numbers and no others."""
    assert values_of(FILE.enum_types_by_name[enum]) == TABLE["enums"][enum]


def test_comparison_sees_a_difference() -> None:
    """The comparison is not blind: every fact of a field takes part in it."""
    field = FILE.message_types_by_name["AuthConfig"].fields_by_name["password"]
    facts = facts_of(field)
    assert facts == {"name": "password", "number": 2, "type": "string", "debug_redact": True}
    repeated = FILE.message_types_by_name["PodSandboxConfig"].fields_by_name["port_mappings"]
    assert facts_of(repeated)["repeated"] is True
    mapped = FILE.message_types_by_name["PodSandboxConfig"].fields_by_name["labels"]
    assert facts_of(mapped)["type"] == "map<string, string>"


def test_fast_implementation() -> None:
    """The compiled protobuf back-end is in use; the pure Python one would be ten times slower on lists."""
    assert api_implementation.Type() == "upb"
