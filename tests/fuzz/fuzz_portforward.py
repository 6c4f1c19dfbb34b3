"""Port-forward sessions from anywhere: pairs of streams over SPDY, and channels over WebSocket messages."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from dispatcher_streaming import portforward
from dispatcher_streaming.portforward import Connect, Data, End, Event, Gone, PortForward, Reset
from dispatcher_streaming.portforward_channels import PROTOCOLS, ChannelForward, most_ports, ports_of
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

TOKENS = [
    *FRAMES,
    *(b"open + 0 streamtype=error,port=80,requestid=1\n", b"open + 1 streamtype=error,port=80,requestid=1\n"),
    *(b"open + 0 streamtype=data,port=80,requestid=1\n", b"open + 0 streamtype=data,port=80\n"),
    *(b"port=0", b"port=65536", b"port=080", b"port=99999", b"port=-1", b"port=%D9%A1", b"requestid=", b"requestid=2"),
    *(b"port=80&port=81", b"port=80,81", b"&"),
]
# Early data is kept for a pair that is half open; all the rest is what any connection may keep.
EARLY = 512 * 17 * 1024
KEPT_AT_MOST = 2 * frames.MAX_CONTROL + 2 * connection.MAX_HEADER_BYTES + connection.MAX_STREAMS * 2048 + EARLY


# ----------------------------------------------------------------------------------------------------------------- spdy
def check_spdy(data: bytes) -> str:
    """The property: only ProtocolError; each connection is made once, used while it stands, and told of in order."""
    choice = data[0] if data else 0
    wire = Script().compile(data[1:])
    outcomes = [_outcome(pieces, choice) for pieces in cuts_of(wire)]
    hold_equal(outcomes)
    kinds = [type(event).__name__ for event, _ in itertools.groupby(outcomes[0].events, type) for event in [event]]
    return f"{outcomes[0].error} {' '.join(kinds[:12])} {min(len(outcomes[0].output), 160)}"


def _outcome(pieces: Sequence[bytes], choice: int) -> Outcome:
    now = 0.0
    session = PortForward(clock_s=lambda: now)
    outcome = outcome_of(session.receive, pieces, same=("key",))
    kept = footprint(session)
    assert kept <= KEPT_AT_MOST, f"{kept} bytes are kept"
    _hold_events(outcome.events)
    if outcome.error:  # the connection is closed
        return outcome
    tail = bytearray(session.data("nothing", b"x") + session.end("nothing"))
    for number, key in enumerate(sorted({event.key for event in outcome.events if isinstance(event, Connect)})):
        tail += session.data(key, b"some") + session.end_output(key)
        act = (session.end, session.give_up, lambda key: session.fail(key, "it failed"))[(choice + number) % 3]
        tail += act(key) + act(key) + session.data(key, b"late")
    now = portforward.PAIR_S + 1
    tail += session.expire()
    assert not session.expire()
    hold_frames(outcome.output + bytes(tail))
    left = footprint(session.connection)
    assert left <= KEPT_AT_MOST - EARLY
    return outcome


def _hold_events(events: Sequence[Event]) -> None:
    standing: dict[str, bool] = {}  # whether the client may still send
    for event in events:
        if isinstance(event, Connect):
            assert 0 < event.port < 65536
            assert event.key not in standing, "connected twice"
            standing[event.key] = True
        elif isinstance(event, Data):
            assert standing.get(event.key), "data of a connection that does not stand"
            assert event.data
        elif isinstance(event, End):
            assert standing.get(event.key), "the end of a connection that does not stand"
            standing[event.key] = False
        elif isinstance(event, Reset):
            assert standing.pop(event.key, None) is not None, "a reset of what does not stand"
        else:
            assert isinstance(event, Gone)


# ------------------------------------------------------------------------------------------------------------- channels
def check_channels(data: bytes) -> str:
    """The property: a query is a list of ports or none; data is of channels that exist and stand."""
    protocol = PROTOCOLS[data[0] % len(PROTOCOLS) if data else 0]
    query, _, rest = data[1:].partition(b"\n")
    ports = ports_of(query.decode("latin-1"))
    if ports is None:
        return "no ports"
    assert all(0 < port < 65536 for port in ports)
    session = ChannelForward(ports[: most_ports(protocol)], protocol)
    messages = [text_of(line) for line in itertools.islice(lines_of(rest), 300)]
    outcome = outcome_of(lambda message: (session.receive(message)[0], b""), messages, same=("key",))
    keys = {event.key for event in session.opening() if isinstance(event, Connect)}
    assert all(isinstance(event, Data) and event.key in keys for event in outcome.events)
    assert footprint(session) < 64 * 1024
    for key in sorted(keys):
        told = session.data(key, b"some") + (session.fail(key, "it failed") if len(data) % 2 else session.end(key))
        assert len(told) <= 2
        assert session.data(key, b"late") == session.fail(key, "again") == []
    assert session.is_over
    return f"{protocol} {len(ports).bit_length()} {outcome.error} {len(outcome.events).bit_length()}"


# ---------------------------------------------------------------------------------------------------------- the fuzzers
def generate_spdy(chance: random.Random) -> bytes:
    """A client with several connections, most of them right."""
    lines = []
    for number in range(chance.randrange(1, 5)):
        request = chance.choice([f",requestid={number}", f",requestid={number}", ",requestid=0", ""])
        port = chance.choice(["80", "80", "81", "65535", "0", "65536", "", "x", "%D9%A1"])
        pair = [
            f"open + {chance.choice([1, 1, 0])} streamtype=error,port={port}{request}",
            f"open + {chance.choice([0, 0, 0, 1])} streamtype=data,port={port}{request}",
        ]
        if chance.random() < 0.15:
            pair.reverse()
        if chance.random() < 0.15:
            pair.pop(chance.randrange(2))
        lines += pair
    for _ in range(chance.randrange(8)):
        stream = 1 + chance.randrange(2 * len(lines))
        line = chance.choice(
            [
                f"data {stream} {chance.choice([0, 0, 1])} abc{chance.choice(['', '{3000}', '{20000}'])}",
                f"frame 3 0 %00%00%00%{stream:02X}%00%00%00%05",
                chance.choice(lines),
            ]
        )
        lines.insert(chance.randrange(len(lines) + 1), line)
    if chance.random() < 0.01:
        lines.insert(0, f"1100*open + 0 streamtype={chance.choice(['data', 'error', 'x'])},port=80")
    return chance.randbytes(1) + "\n".join(lines).encode()


def generate_channels(chance: random.Random) -> bytes:
    """Ports and messages for them."""
    ports = ",".join(chance.choice(["80", "81", "65535", "0", "x", ""]) for _ in range(chance.choice([1, 2, 3, 200])))
    query = chance.choice([f"port={ports}", f"port={ports}&port=80", "", "x=1"])
    lines = [f"%{chance.choice([0, 1, 2, 3, 9, 254, 255]):02X}abc" for _ in range(chance.randrange(6))]
    lines += [chance.choice(["0MTIz", "1MTIz", "2MT", "9", "xMTIz", "0%FF"]) for _ in range(chance.randrange(4))]
    chance.shuffle(lines)
    return chance.randbytes(1) + query.encode() + b"\n" + "\n".join(lines).encode()


def make_fuzzer(carrier: str, **changes: Any) -> Fuzzer:
    """The fuzzer of one carrier: `spdy` or `channels`."""
    check, generate = (check_spdy, generate_spdy) if carrier == "spdy" else (check_channels, generate_channels)
    return Fuzzer(check=check, corpus=f"portforward_{carrier}", tokens=TOKENS, generate=generate, **changes)


@pytest.mark.parametrize("carrier", ["spdy", "channels"])
def test_clients_are_understood_or_refused(carrier: str) -> None:
    """Nothing but ProtocolError is ever raised, memory is bounded, and cuts change nothing."""
    print(make_fuzzer(carrier).run())


def _any_number(headers: Any) -> int | None:
    text = headers.get("port", "")
    return int(text) if text.isdigit() else None


_open_rightly = PortForward._open


def _connect_at_once(self: PortForward, event: Any, events: list[Event]) -> bytes:
    reply = _open_rightly(self, event, events)
    key = self._keys.get(event.stream_id) or self._errors.get(event.stream_id, "")
    if key in self._halves:
        events.append(Connect(key, self._pairs[key].port))
    return reply


def _pass_early_data(self: PortForward, event: Any, events: list[Event]) -> bytes:
    if (key := self._keys.get(event.stream_id)) is not None:
        events.append(Data(key, event.data))
    return b""


def _channels_of_anyone(self: ChannelForward, message: bytes) -> tuple[list[Event], list[bytes]]:
    return ([Data(str(message[0] // 2), message[1:])] if message else []), []


PLANTED: list[tuple[str, str, Any, str, Any]] = [
    ("any number for a port", "spdy", portforward, "_port", _any_number),
    ("half a pair for a whole one", "spdy", PortForward, "_open", _connect_at_once),
    ("data before its connection", "spdy", PortForward, "_data", _pass_early_data),
    ("channels that do not exist", "channels", ChannelForward, "receive", _channels_of_anyone),
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
