"""Cutting long answers: turns on the loop while they are made, and messages of a size that every client takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

T = TypeVar("T")
M = TypeVar("M", bound=Message)

MESSAGE_BYTES = 1 << 20  # a batch ends when it is this long: far below the 16 MiB that a client takes
_AT_ONCE = 50  # messages that are made before others get their turn


async def in_turns(entries: Iterable[T], make: Callable[[T], M]) -> AsyncIterator[M]:
    """Make a message of each entry, giving way to others now and then."""
    for number, entry in enumerate(entries, start=1):
        yield make(entry)
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)


async def in_batches(messages: AsyncIterator[M]) -> AsyncIterator[list[M]]:
    """Collect messages into batches of about `MESSAGE_BYTES`, never empty; one that is longer stands alone."""
    batch: list[M] = []
    size = 0
    async for message in messages:
        length = message.ByteSize()
        if batch and size + length > MESSAGE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += length
    if batch:
        yield batch


def cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join serialised entries of one repeated field into messages of about `MESSAGE_BYTES`."""
    batch: list[bytes] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece) > MESSAGE_BYTES:
            yield b"".join(batch)
            batch, size = [], 0
        batch.append(piece)
        size += len(piece)
    if batch:
        yield b"".join(batch)
