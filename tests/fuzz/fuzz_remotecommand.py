"""exec and attach sessions from anywhere, over SPDY streams and over WebSocket messages."""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from dispatcher.api import ExecStream
from dispatcher.model import ContainerId
from dispatcher_streaming import messages, remotecommand
from dispatcher_streaming.remotecommand import (
    Event,
    Ready,
    Resize,
    ResizeReader,
    SpdyCommand,
    StdinData,
    StdinEnd,
    WebSocketCommand,
    expected_streams,
)
from dispatcher_streaming.spdy import connection, frames
from tests.fuzz.harness import Fuzzer, finds
from tests.fuzz.wire import TOKENS as FRAMES
from tests.fuzz.wire import (
    Outcome,
    Script,
    cuts_of,
    footprint,
    hold_equal,
    hold_frames,
    lines_of,
    outcome_of,
    text_of,
)

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]

SIZES = [b'{"Width":80,"Height":24}', b'{"width":1,"HEIGHT":65535}', b'{"Width":true,"Height":0}', b'{"Width":']
TOKENS = [
    *FRAMES,
    *(size.replace(b"{", b"%7B").replace(b"}", b"%7D") for size in SIZES),
    *(
        b"%7B",
        b"%7D",
        b"[{5000}",
        b"9{5000}",
        b"%5B{5000}%7D",
        b'"Width":',
        b'"Height":',
        b"1e999",
        b"NaN",
        b"%20{2000}",
    ),
    *(b"%00", b"%01", b"%02", b"%03", b"%04", b"%FF%00", b"0", b"4", b"MTIz", b"="),
]
KEPT_AT_MOST = 2 * frames.MAX_CONTROL + connection.MAX_HEADER_BYTES + connection.MAX_STREAMS * 1024
KEPT_OF_MESSAGES = 8 * 1024  # a size that is not complete yet
MESSAGES_LIMIT = 300
MESSAGE_LIMIT = 128 * 1024


def requests() -> list[ExecStream]:
    """One for each set of streams that a client may ask for."""
    container = ContainerId("c" * 64)
    chosen = [flags for flags in itertools.product((False, True), repeat=3) if any(flags)]
    return [
        ExecStream(
            container_id=container, command=("x",), tty=tty, stdin=stdin, stdout=stdout, stderr=stderr and not tty
        )
        for tty in (False, True)
        for stdin, stdout, stderr in chosen
        if stdin or stdout or not tty
    ]


REQUESTS = requests()


# ----------------------------------------------------------------------------------------------------------------- spdy
def check_spdy(data: bytes) -> str:
    """The property: only ProtocolError, the same events and answers whatever the cuts, and frames that a client takes."""
    choice = data[0] if data else 0
    request, version = REQUESTS[choice % len(REQUESTS)], 1 + choice % 4
    wire = Script().compile(data[1:])
    outcomes = [_outcome(request, version, pieces, choice) for pieces in cuts_of(wire)]
    hold_equal(outcomes)
    first = outcomes[0]
    return f"{first.error} {' '.join(_kinds(first.events))} {min(len(first.output), 160)}"


def _outcome(request: ExecStream, version: int, pieces: Sequence[bytes], choice: int) -> Outcome:
    session = SpdyCommand(request, version)
    outcome = outcome_of(session.receive, pieces, same=())
    kept = footprint(session)
    assert kept <= KEPT_AT_MOST, f"{kept} bytes are kept"
    opened = _hold_events(outcome.events, request)
    assert opened <= 1, "ready twice"
    if outcome.error:  # the connection is closed
        return outcome
    tail = [session.output(name, b"some") for name in ("stdout", "stderr", "stdin", "nothing")]
    tail.append(session.finish(None if choice & 16 else choice & 7, "it failed" if choice & 8 else ""))
    assert sum(map(len, tail)) < 4096
    hold_frames(outcome.output + b"".join(tail))
    return outcome


def _hold_events(events: Sequence[Event], request: ExecStream) -> int:
    for event in events:
        if isinstance(event, StdinData | StdinEnd):
            assert request.stdin, "input that nobody asked for"
        elif isinstance(event, Resize):
            assert type(event.width) is int
            assert 0 < event.width < 65536
            assert type(event.height) is int
            assert 0 < event.height < 65536
    return sum(isinstance(event, Ready) for event in events)


def _kinds(events: Sequence[Event]) -> list[str]:
    return [type(event).__name__ for event, _ in itertools.groupby(events, type) for event in [event]][:12]


# ------------------------------------------------------------------------------------------------------------ websocket
def check_websocket(data: bytes) -> str:
    """The property: only ProtocolError, input in order whatever the borders of messages, and nothing is kept."""
    choice = data[0] if data else 0
    request = REQUESTS[choice % len(REQUESTS)]
    protocol = remotecommand.WEBSOCKET_PROTOCOLS[choice % len(remotecommand.WEBSOCKET_PROTOCOLS)]
    messages = [text_of(line)[:MESSAGE_LIMIT] for line in itertools.islice(lines_of(data[1:]), MESSAGES_LIMIT)]
    cuts = [messages] if "base64" in protocol else [messages, list(_cut_up(messages))]
    outcomes = [_of_messages(request, protocol, each) for each in cuts]
    hold_equal(outcomes)
    return f"{protocol} {outcomes[0].error} {' '.join(_kinds(outcomes[0].events))}"


def _of_messages(request: ExecStream, protocol: str, messages: Sequence[bytes]) -> Outcome:
    session = WebSocketCommand(request, protocol)
    outcome = outcome_of(lambda message: (session.receive(message), b""), messages, same=())
    kept = footprint(session)
    assert kept <= KEPT_OF_MESSAGES + footprint(request), f"{kept} bytes are kept"
    _hold_events(outcome.events, request)
    told = [*session.greeting(), *session.output("stdout", b"some"), *session.finish(choice_of(messages))]
    assert all(message[0] in ((0x31, 0x32, 0x33) if "base64" in protocol else (1, 2, 3)) for message in told)
    return outcome


def choice_of(messages: Sequence[bytes]) -> int:
    """Some exit code."""
    return len(messages) % 256


def _cut_up(messages: Sequence[bytes]) -> Iterator[bytes]:
    """The same content in smaller messages. What ends a channel has no content to cut."""
    for message in messages:
        if message[:1] == b"\xff" or len(message) < 3:
            yield message
            continue
        channel, content = message[:1], message[1:]
        size = max(1, len(content) // 7) if len(content) > 60 else 1
        for start in range(0, len(content), size):
            yield channel + content[start : start + size]


# ---------------------------------------------------------------------------------------------------------- the fuzzers
def generate_spdy(chance: random.Random) -> bytes:
    """A client that mostly opens what it must, in any order."""
    choice = chance.randrange(256)
    names = sorted(expected_streams(REQUESTS[choice % len(REQUESTS)], 1 + choice % 4))
    chance.shuffle(names)
    if chance.random() < 0.3:
        names.append(chance.choice(["stdin", "resize", "other", "", "error"]))
    lines = [f"open + {chance.choice([0, 0, 0, 1])} streamtype={name}" for name in names]
    if chance.random() < 0.01:
        lines.insert(chance.randrange(len(lines)), "1100*open + 0 streamtype=x")
    for _ in range(chance.randrange(6)):
        stream = 1 + 2 * chance.randrange(len(names) + 1)
        text = _escaped(chance.choice(SIZES)) * chance.randrange(3) + chance.choice(
            ["", "abc", "abc{3000}", "[{5000}%7D"]
        )
        kind = chance.choice(["data", "data", "data", "frame"])
        if kind == "data":
            lines.append(f"data {stream} {chance.choice([0, 0, 1])} {text}")
        else:
            lines.append(f"frame {chance.choice([3, 6, 7])} 0 %00%00%00%0{chance.randrange(9)}%00%00%00%05")
    return bytes([choice]) + "\n".join(lines).encode()


def generate_websocket(chance: random.Random) -> bytes:
    """Messages on channels that exist and on others."""
    lines = []
    for _ in range(chance.randrange(8)):
        count = chance.choice(["", "", "", "200*"])
        channel = chance.choice(["%00", "%00", "%04", "%04", "%01", "%05", "%FF", "%FF%00", "0", "4", "9"])
        text = chance.choice(
            ["", "abc", "MTIz", "abc{3000}", "[{5000}%7D", *map(_escaped, SIZES), *map(_escaped, SIZES)]
        )
        lines.append(f"{count}{channel}{text}")
    return chance.randbytes(1) + "\n".join(lines).encode()


def _escaped(text: bytes) -> str:
    return text.decode().replace("{", "%7B").replace("}", "%7D")


def make_fuzzer(carrier: str, **changes: Any) -> Fuzzer:
    """The fuzzer of one carrier: `spdy` or `websocket`."""
    check, generate = (check_spdy, generate_spdy) if carrier == "spdy" else (check_websocket, generate_websocket)
    return Fuzzer(check=check, corpus=f"remotecommand_{carrier}", tokens=TOKENS, generate=generate, **changes)


@pytest.mark.parametrize("carrier", ["spdy", "websocket"])
def test_clients_are_understood_or_refused(carrier: str) -> None:
    """Nothing but ProtocolError is ever raised, memory is bounded, and cuts change nothing."""
    print(make_fuzzer(carrier).run())


def _keep_everything(self: Any, piece: bytes) -> None:
    self._text += piece


def _parse_anything(piece: bytes) -> Resize | None:
    try:
        found = json.loads(piece)
        return Resize(found["Width"], found["Height"])
    except (ValueError, KeyError, TypeError):
        return None


def _accept_all(self: SpdyCommand, event: Any, events: list[Event]) -> bytes:
    name = event.headers.get("streamtype", "")
    self._ids[name], self._names[event.stream_id] = event.stream_id, name
    if set(self._ids) >= expected_streams(self.request, self.version):
        events.append(Ready())
    return self.connection.accept(event.stream_id)


def _receive_batch(self: SpdyCommand, received: bytes) -> tuple[list[Event], bytes]:
    events: list[Event] = []
    output = bytearray()
    for event in self.connection.receive(received):
        if isinstance(event, connection.StreamOpened):
            output += self._open(event, events)
        elif isinstance(event, connection.DataReceived):
            self._data(event, events)
    return events, bytes(output) + self.connection.take_output()


def _split_carelessly(message: bytes, _protocol: str) -> tuple[int, bytes]:
    return (message[0], message[1:]) if message[0] < 0x30 else (message[0] - 0x30, base64.b64decode(message[1:]))


PLANTED: list[tuple[str, str, Any, str, Any]] = [
    ("a size without a limit", "websocket", ResizeReader, "_keep", _keep_everything),
    ("sizes of any kind", "spdy", remotecommand, "_parse_size", _parse_anything),
    ("streams that were not asked for", "spdy", SpdyCommand, "_open", _accept_all),
    ("acts behind the whole read", "spdy", SpdyCommand, "receive", _receive_batch),
    ("base64 that is none", "websocket", messages, "split", _split_carelessly),
]


@pytest.mark.parametrize(
    ("name", "carrier", "where", "part", "replacement"), PLANTED, ids=[planted[0] for planted in PLANTED]
)
def test_planted_faults_are_found(
    monkeypatch: pytest.MonkeyPatch, name: str, carrier: str, where: Any, part: str, replacement: Any
) -> None:
    """Each is caught within seconds."""
    monkeypatch.setattr(where, part, replacement)
    finds(make_fuzzer(carrier, seconds=120, seed=1), name)
