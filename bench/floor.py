"""A gRPC server that does nothing: it answers each known request with the bytes of a table. `floor.py SOCKET TABLE`.

It is the least that any server on grpc.aio costs for the same answers, so it is measured beside ours in the same run.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

Answers = dict[tuple[str, bytes], bytes]


def handler_for(rpc: str, answers: Answers) -> Callable[[bytes, Any], Awaitable[bytes]]:
    """Return the handler of one RPC."""

    async def handle(request: bytes, _context: Any) -> bytes:
        return answers[rpc, request]

    return handle


async def serve(path: str, answers: Answers) -> None:
    """Serve until killed."""
    server = grpc.aio.server()
    handlers: dict[str, Any] = {
        rpc: grpc.unary_unary_rpc_method_handler(handler_for(rpc, answers)) for rpc, _ in answers
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("runtime.v1.RuntimeService", handlers)])
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    """Run the command line."""
    path, table = sys.argv[1:3]
    entries = json.loads(Path(table).read_text(encoding="utf-8"))
    answers = {(rpc, bytes.fromhex(request)): bytes.fromhex(answer) for rpc, request, answer in entries}
    asyncio.run(serve(path, answers))


if __name__ == "__main__":
    main()
