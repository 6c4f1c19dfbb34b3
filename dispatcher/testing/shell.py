"""A shell of a few words for containers that exist in memory only, so that the same scripts run on fakes and for real.

Understood: `;`, newline and `&&` between commands, quotes, `$NAME`, `>&2`, and the commands of `_COMMANDS` below, with
`while :; do ...; done` and `trap`. What is not understood fails loudly with exit code 127, as in a real shell. It obeys
signals as the first process of a container does: without a trap only KILL ends it.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Write = Callable[[str, bytes], Awaitable[None]]  # ("stdout" | "stderr", bytes)

# A file that every image has, for `test -x` and for commands that are not a shell's.
PROGRAMS = frozenset(
    {"sh", "/bin/sh", "echo", "cat", "sleep", "true", "false", "printf", "seq", "env", "nc", "test", "head", "hostname"}
)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FOREVER_S = 86400.0


class CannotExecuteError(Exception):
    """There is no such program."""


@dataclass(slots=True)
class Stdin:
    """Bytes on their way into a process, with half-close."""

    data: bytearray = field(default_factory=bytearray)
    closed: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def feed(self, data: bytes) -> None:
        """Add bytes. Raises BrokenPipeError after `close`."""
        if self.closed:
            raise BrokenPipeError
        self.data += data
        self.news.set()

    def close(self) -> None:
        """End of file follows the bytes that are there."""
        self.closed = True
        self.news.set()

    async def read(self) -> bytes:
        """Return what is there, waiting for some; empty at the end."""
        while not self.data and not self.closed:
            self.news.clear()
            await self.news.wait()
        data, self.data = bytes(self.data), bytearray()
        return data

    async def read_line(self) -> str:
        """Return a line without its end; empty at the end of file."""
        line = b""
        while not line.endswith(b"\n"):
            while not self.data and not self.closed:
                self.news.clear()
                await self.news.wait()
            if not self.data:
                break
            line += bytes(self.data[:1])
            del self.data[:1]
        return line.decode(errors="replace").rstrip("\n")


class _Exit(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


@dataclass(slots=True)
class Program:
    """One running process: a command with its surroundings. `hostname` and `listen` are the pod's."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    write: Write
    stdin: Stdin
    is_first: bool = True
    hostname: str = ""
    listen: Callable[[int], None] = lambda _port: None
    _traps: dict[str, str] = field(default_factory=dict)
    _signals: list[str] = field(default_factory=list)
    _signalled: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self) -> None:
        """Raise CannotExecuteError where there is no such program."""
        if not self.command or self.command[0] not in PROGRAMS:
            raise CannotExecuteError(f"no such file: {self.command[0] if self.command else ''}")

    def signal(self, name: str) -> None:
        """Deliver a signal such as "SIGTERM". KILL is not for us: whoever runs us cancels the task."""
        self._signals.append(name.removeprefix("SIG"))
        self._signalled.set()

    async def run(self) -> int:
        """Run to the end and return the exit code."""
        self.check()
        try:
            if self.command[0] in ("sh", "/bin/sh"):
                if len(self.command) < 3 or self.command[1] != "-c":
                    return await self._interactive()
                return await self._script(self.command[2])
            return await self._command(list(self.command))
        except _Exit as end:
            return end.code

    async def _interactive(self) -> int:
        while line := await self._until(self.stdin.read_line()):
            await self._script(line)
        return 0

    async def _script(self, text: str) -> int:
        code = 0
        for joint, statement in _split(text):
            if joint == "&&" and code != 0:
                continue
            loop = re.fullmatch(r"while :;\s*do\s+(.*?);?\s*done", statement, re.DOTALL)
            if loop:
                while True:
                    await self._script(loop[1])
                    await asyncio.sleep(0)
            words = shlex.split(statement)
            code = await self._command([self._expand(word) for word in words]) if words else code
        return code

    def _expand(self, word: str) -> str:
        return re.sub(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?", lambda found: self.env.get(found[1], ""), word)

    async def _command(self, words: list[str]) -> int:
        stream = "stdout"
        if words[-1] in (">&2", "1>&2"):
            words, stream = words[:-1], "stderr"
        if words[0] == "exec":
            words = words[1:]
        name, arguments = words[0], words[1:]
        match name:
            case "echo":
                end = b"\n"
                if arguments[:1] == ["-n"]:
                    arguments, end = arguments[1:], b""
                await self.write(stream, " ".join(arguments).encode() + end)
            case "printf":
                await self.write(stream, arguments[0].encode().decode("unicode_escape").encode("latin-1"))
            case "seq":
                first, last = (1, int(arguments[0])) if len(arguments) == 1 else (int(arguments[0]), int(arguments[1]))
                for number in range(first, last + 1):
                    await self.write(stream, b"%d\n" % number)
            case "head":  # head -c N /dev/zero
                left = int(arguments[1])
                while left:
                    part = min(left, 65536)
                    await self.write(stream, bytes(part))
                    left -= part
            case "env":
                for key, value in self.env.items():
                    await self.write(stream, f"{key}={value}\n".encode())
            case "hostname":
                await self.write(stream, self.hostname.encode() + b"\n")
            case "sleep":
                await self._until(asyncio.sleep(_seconds(arguments[0])))
            case "cat":
                while data := await self._until(self.stdin.read()):
                    await self.write(stream, data)
            case "read":
                await self._until(self.stdin.read_line())
            case "nc":  # nc -ll -p PORT -e cat: an echo server for as long as it runs
                self.listen(int(arguments[arguments.index("-p") + 1]))
                await self._until(asyncio.sleep(_FOREVER_S))
            case "trap":
                for signal in arguments[1:]:
                    self._traps[signal.removeprefix("SIG")] = arguments[0]
            case "exit":
                raise _Exit(int(arguments[0]) if arguments else 0)
            case "true" | ":":
                return 0
            case "false":
                return 1
            case _:
                await self.write("stderr", f"sh: {name}: not found\n".encode())
                return 127
        return 0

    async def _until(self, pending: Awaitable[T]) -> T:
        """Wait for something, letting signals in. As in a shell, a trap runs when the wait is over or cut short."""
        task = asyncio.ensure_future(pending)
        try:
            while True:
                signalled = asyncio.ensure_future(self._signalled.wait())
                try:
                    await asyncio.wait({task, signalled}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    signalled.cancel()
                while self._signals:
                    await self._take(self._signals.pop(0))
                self._signalled.clear()
                if task.done():
                    return task.result()
        finally:
            task.cancel()

    async def _take(self, name: str) -> None:
        action = self._traps.get(name)
        if action:
            await self._script(action)
        elif action is None and not self.is_first:
            raise _Exit(128 + _NUMBERS.get(name, 15))


_NUMBERS = {"HUP": 1, "INT": 2, "QUIT": 3, "KILL": 9, "USR1": 10, "USR2": 12, "TERM": 15}


def signal_number(name: str) -> int:
    """Return the number of a signal by its name, with or without SIG."""
    return _NUMBERS.get(name.removeprefix("SIG"), 15)


def _seconds(text: str) -> float:
    return float(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else float(text)


def _split(text: str) -> list[tuple[str, str]]:
    """Return (joint, statement) pairs; joints within quotes and within do..done do not count."""
    parts: list[tuple[str, str]] = []
    joint, current, quote, depth, at = ";", "", "", 0, 0
    while at < len(text):
        char = text[at]
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif re.match(r"\bdo\b", text[at:]) and (at == 0 or not text[at - 1].isalnum()):
            depth += 1
        elif re.match(r"\bdone\b", text[at:]) and (at == 0 or not text[at - 1].isalnum()):
            depth -= 1
        elif not depth and (char in ";\n" or text.startswith("&&", at)) and not current.strip().startswith("while :"):
            parts.append((joint, current.strip()))
            joint, current = ("&&", "") if char == "&" else (";", "")
            at += 2 if char == "&" else 1
            continue
        current += char
        at += 1
        if depth == 0 and current.strip().startswith("while :") and current.rstrip().endswith("done"):
            parts.append((joint, current.strip()))
            joint, current = ";", ""
    parts.append((joint, current.strip()))
    return [(how, statement) for how, statement in parts if statement]
