"""Print the log of a container: standard output to standard output, standard error to standard error.

Names a container by its id, or a pod (with -c where it has several containers). With -f it follows over log rotations
until the container has ended. Reads the log file on this node, so it works for exited containers, too.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING, BinaryIO

from dispatcher.commands.connection import add_endpoint, connect, find_container
from dispatcher.commands.log_reader import LogReader, LogRecord
from dispatcher.commands.output import Console, Exit, Failure

if TYPE_CHECKING:
    from dispatcher.cri.client import CriClient

_POLL_S = 0.2
_ENDED = 2  # CONTAINER_EXITED


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("target", metavar="POD|CONTAINER", help="an id, its beginning, or a pod's name")
    parser.add_argument("-c", "--container", metavar="NAME", default="", help="which container of the pod")
    parser.add_argument("-f", "--follow", action="store_true", help="go on while the container runs")
    parser.add_argument("-n", "--tail", metavar="LINES", type=int, help="begin this many lines before the end")
    parser.add_argument("-t", "--timestamps", action="store_true", help="print the time before each line")
    add_endpoint(parser)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    async with connect(args) as client:
        container = await find_container(client, args.target, args.container)
        reply = await client.call("ContainerStatus", container_id=container.id)
        path = reply.status.log_path
        if not path:
            raise Failure(f"container {container.metadata.name} has no log: its pod has no log folder")
        reader = LogReader(path, args.tail)
        writer = LogWriter(timestamps=args.timestamps)
        try:
            if args.follow:
                await _follow(client, container.id, reader, writer)
            else:
                writer.write_all(reader)
        except PermissionError as error:
            raise Failure(f"{path}: {error.strerror}", hint="run the command as root") from error
        finally:
            reader.close()
    del console
    return Exit.OK


async def _follow(client: CriClient, container_id: str, reader: LogReader, writer: LogWriter) -> None:
    from dispatcher.cri.client import CallFailed

    while True:
        # The state is asked before the file is read: what was written before an exit is in what is read after it.
        try:
            reply = await client.call("ContainerStatus", container_id=container_id)
            ended = reply.status.state >= _ENDED
        except CallFailed as error:
            if error.code != "NOT_FOUND":
                raise
            ended = True
        writer.write_all(reader)
        if ended:
            return
        await asyncio.sleep(_POLL_S)


class LogWriter:
    """Writes records to where a container's output belongs.

    Args:
        timestamps: print each line's time before it.
        prefix: printed before each line, such as the container's name.
        out: the stream for standard output; None for this process' own.
        err: likewise for standard error.
    """

    def __init__(
        self,
        *,
        timestamps: bool = False,
        prefix: bytes = b"",
        out: BinaryIO | None = None,
        err: BinaryIO | None = None,
    ) -> None:
        self._timestamps = timestamps
        self._prefix = prefix
        self._streams = {
            b"stdout": out if out is not None else sys.stdout.buffer,
            b"stderr": err if err is not None else sys.stderr.buffer,
        }
        self._within: dict[bytes, bool] = {}

    def write_all(self, reader: LogReader) -> None:
        """Write what the reader has now, and flush."""
        for record in reader.read():
            self.write(record)
        for stream in self._streams.values():
            stream.flush()

    def write(self, record: LogRecord) -> None:
        """Write one record."""
        stream = self._streams[record.stream]
        if not self._within.get(record.stream):
            stream.write(self._prefix)
            if self._timestamps:
                stream.write(record.time + b" ")
        stream.write(record.output)
        self._within[record.stream] = record.is_partial
