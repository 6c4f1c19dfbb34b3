"""Batches are bounded by size, hold everything once and in order, and are never empty."""

from __future__ import annotations

from collections.abc import AsyncIterator

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.batches import MESSAGE_BYTES, cut, in_batches, in_turns


def items(sizes: list[int]) -> list[pb.PodSandbox]:
    return [pb.PodSandbox(id=str(number), labels={"a": "x" * size}) for number, size in enumerate(sizes)]


SIZES = [10, MESSAGE_BYTES // 2, MESSAGE_BYTES // 2, MESSAGE_BYTES * 3, 10, 10]


async def test_messages() -> None:
    made = items(SIZES)
    batches = [batch async for batch in in_batches(in_turns(made, lambda item: item))]
    assert [item for batch in batches for item in batch] == made
    assert [len(batch) for batch in batches] == [2, 1, 1, 2]


def test_bytes() -> None:
    made = items(SIZES)
    pieces = [pb.ListPodSandboxResponse(items=[item]).SerializeToString() for item in made]
    replies = [pb.StreamPodSandboxesResponse.FromString(batch) for batch in cut(pieces)]
    assert [item for reply in replies for item in reply.pod_sandboxes] == made
    assert all(reply.pod_sandboxes for reply in replies)
    assert len(replies) == 4


def test_containers_have_the_same_field_in_both_replies() -> None:
    entry = pb.Container(id="c")
    piece = pb.ListContainersResponse(containers=[entry]).SerializeToString()
    assert [*pb.StreamContainersResponse.FromString(piece).containers] == [entry]


async def test_nothing_is_no_message() -> None:
    async def nothing() -> AsyncIterator[pb.PodSandbox]:
        for item in items([]):
            yield item

    assert [batch async for batch in in_batches(nothing())] == []
    assert [*cut([])] == []
