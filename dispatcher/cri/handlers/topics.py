"""What our own commands ask the daemon beyond CRI: a Status call whose metadata names topics.

There is no RPC for it, and a kubelet never sends this metadata. The reply is a StatusResponse with one text per topic in
its info, and nothing else.
"""

from __future__ import annotations

from typing import Final

from dispatcher.cri import api_pb2 as pb
from dispatcher.deps import Deps
from dispatcher.errors import InvalidRequest, OutOfResources

TOPIC_KEY: Final = "dispatcher-topic"
MAX_BYTES: Final = 15 << 20  # one below what a message may hold


async def handle(names: tuple[str, ...], request: pb.StatusRequest, deps: Deps) -> pb.StatusResponse:
    """Answer from memory.

    Raises:
        InvalidRequest: a topic that there is not.
        OutOfResources: so many records that one message cannot hold them.
    """
    unknown = sorted(set(names) - set(deps.topics))
    if unknown:
        raise InvalidRequest(f"The topics are {', '.join(sorted(deps.topics))}; not {unknown[0][:40]!r}.")
    texts = {name: deps.topics[name]() for name in names}
    length = sum(len(text.encode()) for text in texts.values())
    if length > MAX_BYTES:
        raise OutOfResources(f"What was asked for is {length} bytes long, and a message holds {MAX_BYTES}.")
    return pb.StatusResponse(info=texts)
