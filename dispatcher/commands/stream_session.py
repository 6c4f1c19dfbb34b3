"""The client's end of an exec session: this terminal on one side, the daemon's WebSocket on the other.

Speaks v5.channel.k8s.io: each message begins with the number of its channel; 255 closes the channel that it names. Input
is read by a thread of its own, which dies with the process: a read from a terminal cannot be cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from dispatcher.commands.output import Exit, Failure

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

_PROTOCOL = "v5.channel.k8s.io"
_STDIN, _STDOUT, _STDERR, _ERROR, _RESIZE, _CLOSE = 0, 1, 2, 3, 4, 255
_BLOCK = 32 * 1024


async def run_session(url: str, *, stdin: bool, terminal: bool) -> int:
    """Connect this process' streams to a session, and return the exit code of its command.

    Args:
        url: what the Exec call answered.
        stdin: pass on this process' input.
        terminal: the command has a terminal; where ours is one, it is put into raw mode meanwhile.

    Raises:
        Failure: the session cannot be begun, or ended without a result.
    """
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException
    from websockets.typing import Subprotocol

    address = "ws" + url.removeprefix("http")
    try:
        # No proxy, whatever the shell is set up for: the daemon listens on this node only.
        async with connect(address, subprotocols=[Subprotocol(_PROTOCOL)], max_size=1 << 24, proxy=None) as socket:
            with _raw_terminal(on=terminal and stdin and sys.stdin.isatty()):
                return await _exchange(socket, stdin=stdin, terminal=terminal)
    except (WebSocketException, OSError) as error:
        raise Failure(f"the session was lost: {error}", code=Exit.NO_RESULT) from error


async def _exchange(socket: ClientConnection, *, stdin: bool, terminal: bool) -> int:
    loop = asyncio.get_running_loop()
    tasks = [asyncio.create_task(_send_input(socket))] if stdin else []
    if terminal:
        resized = asyncio.Event()
        resized.set()
        loop.add_signal_handler(signal.SIGWINCH, resized.set)
        tasks.append(asyncio.create_task(_send_sizes(socket, resized)))
    try:
        return await _receive(socket)
    finally:
        if terminal:
            loop.remove_signal_handler(signal.SIGWINCH)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _receive(socket: ClientConnection) -> int:
    streams: dict[int, BinaryIO] = {_STDOUT: sys.stdout.buffer, _STDERR: sys.stderr.buffer}
    status = b""
    async for message in socket:
        data = message.encode() if isinstance(message, str) else message
        if not data:
            continue
        stream = streams.get(data[0])
        if stream is not None:
            stream.write(data[1:])
            stream.flush()
        elif data[0] == _ERROR:
            status += data[1:]
    return exit_code_of(status)


def exit_code_of(status: bytes) -> int:
    """Return the exit code that a session's `metav1.Status` tells.

    Raises:
        Failure: the command could not be run, or there is no status.
    """
    try:
        parsed = json.loads(status)
        if parsed["status"] == "Success":
            return Exit.OK
        if parsed.get("reason") == "NonZeroExitCode":
            causes = parsed["details"]["causes"]
            return int(next(cause["message"] for cause in causes if cause["reason"] == "ExitCode"))
        message = str(parsed["message"])
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise Failure("the session ended without a result", code=Exit.NO_RESULT) from error
    raise Failure(message, code=Exit.NO_RESULT)


async def _send_input(socket: ClientConnection) -> None:
    """Send what is read from standard input, and its end. The queue is short: nothing is read ahead of the network."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue(maxsize=2)

    def read() -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while True:
                block = os.read(sys.stdin.fileno(), _BLOCK)
                asyncio.run_coroutine_threadsafe(queue.put(block), loop).result()
                if not block:
                    return

    threading.Thread(target=read, name="stdin", daemon=True).start()
    while block := await queue.get():
        await socket.send(bytes([_STDIN]) + block)
    await socket.send(bytes([_CLOSE, _STDIN]))


async def _send_sizes(socket: ClientConnection, resized: asyncio.Event) -> None:
    while True:
        await resized.wait()
        resized.clear()
        size = shutil.get_terminal_size()
        await socket.send(bytes([_RESIZE]) + json.dumps({"Width": size.columns, "Height": size.lines}).encode())


@contextlib.contextmanager
def _raw_terminal(*, on: bool) -> Iterator[None]:
    """Pass every key through, Ctrl-C as well, and set the terminal back afterwards."""
    if not on:
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
