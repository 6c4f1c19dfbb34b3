"""What our own commands ask the daemon beyond CRI: a Status call whose metadata names topics.

There is no RPC for it, and a kubelet never sends this metadata. The reply is a StatusResponse with one text per topic in
its info, and nothing else.
"""

from __future__ import annotations

from typing import Final

from dispatcher.cri import api_pb2 as pb
from dispatcher.deps import Deps
from dispatcher.errors import InvalidRequest

TOPIC_KEY: Final = "dispatcher-topic"
MAX_TEXT: Final = 6 << 20  # two topics and all else in one message


async def handle(names: tuple[str, ...], request: pb.StatusRequest, deps: Deps) -> pb.StatusResponse:
    """Answer from memory. A text that is too long keeps its end, which is the newest part."""
    unknown = sorted(set(names) - set(deps.topics))
    if unknown:
        raise InvalidRequest(f"The topics are {', '.join(sorted(deps.topics))}; not {unknown[0][:40]!r}.")
    return pb.StatusResponse(info={name: deps.topics[name]()[-MAX_TEXT:] for name in names})
