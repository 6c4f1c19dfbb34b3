"""The fields of records belong to RECORD_SCHEMA: whoever changes them raises it, so that an older daemon refuses them.

An older daemon would drop a field that it does not know at its next commit, and the pod would lose it. When this test
fails: raise RECORD_SCHEMA, add a migration if old rows cannot be read as they are, and write the table anew with
`python -m tests.unit.store.test_record_schema`, which adds the new schema and leaves those before it alone.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import typing
from pathlib import Path

from dispatcher.model import ContainerRecord, PodRecord
from dispatcher.model.records import RECORD_SCHEMA

TABLE = Path(__file__).parents[2] / "data/record_fields.json"


def fields_of(*kinds: type) -> dict[str, dict[str, str]]:
    """Every dataclass that a record consists of, with the type of each field; and every enum with its values."""
    found: dict[str, dict[str, str]] = {}

    def visit(kind: object) -> None:
        for argument in typing.get_args(kind):
            visit(argument)
        if isinstance(kind, typing.NewType):
            visit(kind.__supertype__)
        if not isinstance(kind, type) or (name := f"{kind.__module__}.{kind.__name__}") in found:
            return
        if issubclass(kind, enum.Enum):
            found[name] = {member.name: str(member.value) for member in kind}
        elif dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            found[name] = {}
            for field in dataclasses.fields(kind):
                found[name][field.name] = str(field.type)
                visit(hints[field.name])

    for kind in kinds:
        visit(kind)
    return dict(sorted(found.items()))


def test_the_fields_are_those_of_the_schema() -> None:
    known = json.loads(TABLE.read_text())
    assert max(map(int, known)) == RECORD_SCHEMA
    assert fields_of(PodRecord, ContainerRecord) == known[str(RECORD_SCHEMA)], __doc__


@dataclasses.dataclass
class Inner:
    value: int


@dataclasses.dataclass
class Outer:
    inner: tuple[Inner, ...] | None


def test_a_field_is_seen_however_deep_it_lies() -> None:
    """The negative control: what is compared reaches into everything that a record consists of."""
    assert fields_of(Outer) == {
        f"{__name__}.Inner": {"value": "int"},
        f"{__name__}.Outer": {"inner": "tuple[Inner, ...] | None"},
    }
    everything = fields_of(PodRecord, ContainerRecord)
    names = {name.rpartition(".")[2] for name in everything}
    assert {"PodRecord", "ContainerRecord", "PodSpec", "Mount", "ImageVolume", "EnvVar", "Isolation"} <= names
    assert sum(name.endswith(".Route") for name in everything) == 2
    assert everything["dispatcher.transitions.PodState"]["READY"]


def write() -> None:
    """Add the fields of today under RECORD_SCHEMA."""
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    known[str(RECORD_SCHEMA)] = fields_of(PodRecord, ContainerRecord)
    TABLE.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    write()
