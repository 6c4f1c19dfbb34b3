"""Records as bytes and back. JSON, so that an operator can read a database with any tool.

The whole tree of dataclasses is described by their own annotations; there is no second list of fields to forget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from dispatcher.model import ContainerRecord, PodRecord

R = TypeVar("R", PodRecord, ContainerRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A row that could not be read. It is kept in the database, apart, and whatever it describes is left running."""

    kind: str
    id: str
    reason: str
    at_ns: int


class UnreadableError(ValueError):
    """A row's bytes do not describe a record."""


class Codec(Generic[R]):
    """Turns records of one type into bytes and back."""

    def __init__(self, record_type: type[R]) -> None:
        self._adapter: TypeAdapter[R] = TypeAdapter(record_type)

    def encode(self, record: R) -> bytes:
        """Return the record as JSON.

        Raises:
            TypeError: a part that should be plain JSON (facts, a plan's content, options) is not.
        """
        try:
            return self._adapter.dump_json(record, fallback=_plain, warnings="none")
        except PydanticSerializationError as error:
            raise TypeError(f"the record is no plain JSON: {error}") from None

    def decode(self, body: bytes) -> R:
        """Return the record that `encode` took.

        Raises:
            UnreadableError: the bytes are no record; the message says where.
        """
        try:
            return self._adapter.validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UnreadableError(f"{where or 'record'}: {first['msg']}") from None


def _plain(value: object) -> object:
    """Take every kind of mapping for a dict, such as a read-only view of one."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be written")


POD_CODEC = Codec(PodRecord)
CONTAINER_CODEC = Codec(ContainerRecord)
