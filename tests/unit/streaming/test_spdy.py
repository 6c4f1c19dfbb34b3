"""SPDY frames, headers and connections, and the sessions on top, in memory: client and server of the same module."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.api import ExecStream
from dispatcher.model import make_container_id
from dispatcher_streaming import messages, portforward, remotecommand
from dispatcher_streaming.portforward import PortForward
from dispatcher_streaming.remotecommand import SpdyCommand
from dispatcher_streaming.spdy.connection import Connection, DataReceived, ProtocolError, StreamAccepted, StreamReset
from dispatcher_streaming.spdy.frames import MAX_CONTROL, FrameType, control, data
from dispatcher_streaming.spdy.headers import DICTIONARY, HeaderCompressor

EXEC = ExecStream(container_id=make_container_id(), stdin=True, stdout=True, stderr=True)


def exec_transcript() -> bytes:
    """What a client sends for one exec with input: four streams, data, a ping, a half-close, and its leave."""
    client = Connection(is_client=True)
    wire = b""
    for name in ("error", "stdin", "stdout", "stderr"):
        wire += client.open({"streamType": name})[1]
    wire += client.send(3, b"hello ") + client.ping(1) + client.send(3, b"world")
    return wire + client.send(3, b"", fin=True) + client.go_away()


def play(pieces: Sequence[bytes]) -> tuple[list[object], bytes]:
    session = SpdyCommand(EXEC, 4)
    events: list[object] = []
    output = b""
    for piece in pieces:
        found, answer = session.receive(piece)
        events += found
        output += answer
    return merged(events), output


def merged(events: Sequence[object]) -> list[object]:
    """Events with neighbouring input joined: how data is cut is the network's business."""
    found: list[object] = []
    for event in events:
        if isinstance(event, remotecommand.StdinData) and found and isinstance(found[-1], remotecommand.StdinData):
            found[-1] = remotecommand.StdinData(found[-1].data + event.data)
        else:
            found.append(event)
    return found


WHOLE = exec_transcript()
MEANT = [
    remotecommand.Ready(),
    remotecommand.StdinData(b"hello world"),
    remotecommand.StdinEnd(),
    remotecommand.Gone(),
]


def test_a_transcript_means_the_same_whole_and_byte_by_byte() -> None:
    events, output = play([WHOLE])
    assert events == MEANT
    single, _ = play([WHOLE[i : i + 1] for i in range(len(WHOLE))])
    assert single == MEANT
    assert control(FrameType.PING, struct.pack(">I", 1)) in output


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_a_transcript_means_the_same_at_any_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(WHOLE)]
    pieces = [WHOLE[a:b] for a, b in itertools.pairwise(places)]
    assert play(pieces)[0] == MEANT


def test_the_wire_has_the_known_bytes() -> None:
    """The dictionary by its checksum, and the two empty header blocks that peers send."""
    import zlib

    assert (len(DICTIONARY), zlib.adler32(DICTIONARY)) == (1423, 0xE3C6A7C2)
    compressor = HeaderCompressor()
    assert compressor.compress({}).hex() == "78f9e3c6a7c202a6230600000000ffff"
    assert compressor.compress({}).hex() == "020100000000ffff"


def test_a_client_reads_outputs_then_status_then_goaway() -> None:
    client, session = Connection(is_client=True), SpdyCommand(EXEC, 4)
    wire = b"".join(client.open({"streamtype": n})[1] for n in ("error", "stdin", "stdout", "stderr"))
    _, answer = session.receive(wire)
    assert [type(e) for e in client.receive(answer)] == [StreamAccepted] * 4  # before any data
    events = client.receive(session.output("stdout", b"out") + session.finish(7))
    assert events[:3] == [DataReceived(5, b"out", False), DataReceived(5, b"", True), DataReceived(7, b"", True)]
    told = events[3]
    assert isinstance(told, DataReceived)
    assert (told.stream_id, told.fin) == (1, True)
    status = json.loads(told.data)
    assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "7"}]
    assert [e.stream_id for e in events if isinstance(e, StreamReset)].count(3) == 1


@pytest.mark.parametrize(
    ("version", "code", "text"), [(1, 0, b""), (3, 0, b""), (4, 0, b'"Success"'), (5, 9, b'"9"'), (2, 9, b"code 9")]
)
def test_status_by_version(version: int, code: int, text: bytes) -> None:
    assert text in remotecommand.status_bytes(version, code, "")


def test_what_is_too_much_ends_the_connection_or_is_refused() -> None:
    """Header bombs, large control frames, other versions end it; too many streams are refused one by one."""
    bomb = HeaderCompressor().compress({"a": "x" * (1 << 20)})
    assert len(bomb) < MAX_CONTROL
    for wire in (
        control(FrameType.SYN_STREAM, struct.pack(">IIBB", 1, 0, 0, 0) + bomb),
        struct.pack(">II", 0x8003_0001, MAX_CONTROL + 1),
        struct.pack(">II", 0x8002_0001, 0),
        control(FrameType.SYN_STREAM, b"short"),
        control(FrameType.SYN_STREAM, struct.pack(">IIBB", 2, 0, 0, 0) + HeaderCompressor().compress({})),
    ):
        with pytest.raises(ProtocolError):
            Connection().receive(wire)
    client, server = Connection(is_client=True), Connection(max_streams=3)
    server.receive(b"".join(client.open({})[1] for _ in range(10)))
    assert server.stream_count == 3
    assert len([e for e in client.receive(server.take_output()) if isinstance(e, StreamReset)]) == 7


def test_frames_for_streams_that_are_gone_are_ignored() -> None:
    server = Connection()
    assert server.receive(data(99, b"x") + control(FrameType.RST_STREAM, struct.pack(">II", 99, 5))) == []
    assert server.receive(control(FrameType.SETTINGS, b"\0\0\0\0") * 1000) == []
    assert server.stream_count == 0


def test_a_flood_of_sizes_keeps_nothing() -> None:
    reader = remotecommand.ResizeReader()
    assert reader.feed(b'{"Width":80,"He') == []
    assert reader.feed(b'ight":24}\n{"width":0,"height":1}') == [remotecommand.Resize(80, 24)]
    for _ in range(100):
        reader.feed(b"{" * 5000)
    assert len(reader._text) <= 1024
    assert reader.feed(b'}{"Width":81,"Height":25}') == [remotecommand.Resize(81, 25)]


ODD_SIZES = (
    b'{"Width":1,"Height":1}{"Width":true,"Height":true}{"a":' + b"[" * 900 + b"}",
    b'{"Width":1.5,"Height":2}{"Width":' + b" " * 3000 + b'3,"Height":3}{"Width":4,"Height":4}',
    b'}}{"Height":7,"WIDTH":6}\0\xff}[]{"Width":"8","Height":8}',
)


@pytest.mark.parametrize("wire", ODD_SIZES)
def test_sizes_mean_the_same_however_they_are_cut(wire: bytes) -> None:
    whole = remotecommand.ResizeReader().feed(wire)
    for size in (1, 7, 500, 1025):
        reader = remotecommand.ResizeReader()
        assert [s for i in range(0, len(wire), size) for s in reader.feed(wire[i : i + size])] == whole
    assert all(type(found.width) is int for found in whole)


def test_an_end_of_input_may_be_told_again() -> None:
    """By FIN, by a reset behind it, by CLOSE over WebSocket: the process's input ends once, the session goes on."""
    client, session = Connection(is_client=True), SpdyCommand(EXEC, 4)
    session.receive(b"".join(client.open({"streamtype": n})[1] for n in ("error", "stdin", "stdout", "stderr")))
    assert session.receive(client.send(3, b"x", fin=True))[0] == [
        remotecommand.StdinData(b"x"),
        remotecommand.StdinEnd(),
    ]
    again, answer = session.receive(data(3, b"late", fin=True))
    assert again == [remotecommand.StdinEnd()]
    assert [type(e) for e in client.receive(answer)] == [StreamReset]
    assert session.receive(data(3, b"later"))[0] == []
    websocket = remotecommand.WebSocketCommand(EXEC, "v5.channel.k8s.io")
    assert [websocket.receive(b"\xff\0") for _ in range(2)] == [[remotecommand.StdinEnd()]] * 2
    assert websocket.receive(b"\xff\1") == []
    assert remotecommand.WebSocketCommand(EXEC, "v4.channel.k8s.io").receive(b"\xff\0") == []
    deaf = ExecStream(container_id=make_container_id(), stdout=True)
    assert remotecommand.WebSocketCommand(deaf, "v5.channel.k8s.io").receive(b"\xff\0") == []


def test_what_is_refused_does_not_depend_on_cuts() -> None:
    """Refused streams do not stay in the way of those behind them in the same read."""
    client = Connection(is_client=True)
    wire = b"".join(client.open({"streamtype": "nonsense"})[1] for _ in range(1500))
    wire += b"".join(client.open({"streamtype": n})[1] for n in ("error", "stdin", "stdout", "stderr"))
    assert play([wire])[0] == play([wire[i : i + 100] for i in range(0, len(wire), 100)])[0] == [remotecommand.Ready()]


@pytest.mark.parametrize("protocol", remotecommand.WEBSOCKET_PROTOCOLS)
def test_every_websocket_protocol_carries_all_channels(protocol: str) -> None:
    session = remotecommand.WebSocketCommand(EXEC, protocol)
    join = messages.join
    assert session.greeting() == [join(1, b"", protocol)]
    assert session.receive(join(0, b"in\0", protocol)) == [remotecommand.StdinData(b"in\0")]
    assert session.receive(join(4, b'{"Width":5,"Height":6}', protocol)) == [remotecommand.Resize(5, 6)]
    assert session.receive(join(1, b"not ours to read", protocol)) == []
    assert session.receive(b"") == []
    assert session.output("stdout", b"\xff") == [join(1, b"\xff", protocol)]
    (told,) = session.finish(7)
    channel, status = messages.split(told, protocol)
    assert channel == 3
    assert status == remotecommand.status_bytes(session.version, 7, "")


# -------------------------------------------------------------------------------------------------------- port-forward
def opened(client: Connection, request: str, port: str = "80") -> tuple[int, int, bytes]:
    error, first = client.open({"streamtype": "error", "port": port, "requestid": request}, fin=True)
    stream, second = client.open({"streamtype": "data", "port": port, "requestid": request})
    return error, stream, first + second


def test_many_connections_leave_nothing_behind() -> None:
    """Each ends in one of three ways: by the pod, by a failure, by the client's reset."""
    client, session = Connection(is_client=True), PortForward()
    for number in range(600):
        key = str(number)
        _, stream, wire = opened(client, key)
        events, answer = session.receive(wire)
        assert events == [portforward.Connect(key, 80)]
        client.receive(answer)
        if number % 3 == 0:
            client.receive(session.end(key))
            session.receive(client.reset(stream))
        elif number % 3 == 1:
            client.receive(session.fail(key, "refused"))
        else:
            events, answer = session.receive(client.reset(stream))
            assert events == [portforward.Reset(key)]
            assert DataReceived(stream - 2, b"", True) in client.receive(answer)  # else the client waits for ever
    assert not session._pairs
    assert not session._keys
    assert not session._errors
    assert session.connection.stream_count == 0


def test_half_pairs_that_are_reset_are_forgotten() -> None:
    client, session = Connection(is_client=True), PortForward()
    for number in range(600):
        stream, wire = client.open({"streamtype": "error", "port": "1", "requestid": str(number)})
        assert session.receive(wire + client.reset(stream))[0] == []
    assert not session._pairs
    assert not session._errors


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x", "", "８０", "1e3"])
def test_odd_ports_are_refused(port: str) -> None:
    client, session = Connection(is_client=True), PortForward()
    _, _, wire = opened(client, "0", port)
    events, answer = session.receive(wire)
    assert events == []
    assert [type(e) for e in client.receive(answer)] == [StreamReset, StreamReset]


def test_half_open_pairs_are_given_up_in_time() -> None:
    """With a sentence where there is an error stream to say it on; whole pairs stay."""
    now = [0.0]
    client, session = Connection(is_client=True), PortForward(clock_s=lambda: now[0])
    _, _, wire = opened(client, "whole")
    client.receive(session.receive(wire)[1])
    error, first = client.open({"streamtype": "error", "port": "1", "requestid": "a"}, fin=True)
    stream, second = client.open({"streamtype": "data", "port": "1", "requestid": "b"})
    client.receive(session.receive(first + second)[1])
    now[0] = portforward.PAIR_S - 0.1
    assert session.expire() == b""
    now[0] = portforward.PAIR_S
    found = client.receive(session.expire())
    assert isinstance(found[0], DataReceived)
    assert (found[0].stream_id, found[0].fin) == (error, True)
    assert b"30 s" in found[0].data
    assert [e.stream_id for e in found[1:] if isinstance(e, StreamReset)] == [stream]
    assert list(session._pairs) == ["whole"]
    assert session.expire() == b""


def test_data_ahead_of_the_error_stream_waits_for_it_within_bounds() -> None:
    client, session = Connection(is_client=True), PortForward()
    stream, first = client.open({"streamtype": "data", "port": "80", "requestid": "0"})
    assert session.receive(first + data(stream, b"early ") + data(stream, b"bytes", fin=True))[0] == []
    _, second = client.open({"streamtype": "error", "port": "80", "requestid": "0"}, fin=True)
    assert session.receive(second)[0] == [
        portforward.Connect("0", 80),
        portforward.Data("0", b"early bytes"),
        portforward.End("0"),
    ]
    stream, third = client.open({"streamtype": "data", "port": "80", "requestid": "1"})
    for _ in range(100):
        assert session.receive(third + data(stream, b"x" * 1000))[0] == []
        third = b""
    assert list(session._pairs) == ["0"]


def test_a_session_carries_512_connections_and_not_one_more() -> None:
    client, session = Connection(is_client=True), PortForward()
    for number in range(512):
        events, _ = session.receive(opened(client, str(number))[2])
        assert events == [portforward.Connect(str(number), 80)]
    events, answer = session.receive(opened(client, "more")[2])
    assert events == []
    assert [e.status for e in client.receive(answer) if isinstance(e, StreamReset)] == [3, 3]


def test_a_pod_that_ends_first_can_still_be_sent_to() -> None:
    client, session = Connection(is_client=True), PortForward()
    error, stream, wire = opened(client, "0")
    client.receive(session.receive(wire)[1])
    assert client.receive(session.end_output("0")) == [DataReceived(stream, b"", True)]
    assert session.receive(client.send(stream, b"more", fin=True))[0] == [
        portforward.Data("0", b"more"),
        portforward.End("0"),
    ]
    assert client.receive(session.end("0")) == [DataReceived(error, b"", True)]
    assert session.connection.stream_count == 0


def test_a_connection_that_is_given_up_says_nothing_on_its_error_stream() -> None:
    """Clients close their whole session on such a word."""
    client, session = Connection(is_client=True), PortForward()
    error, stream, wire = opened(client, "0")
    client.receive(session.receive(wire)[1])
    assert client.receive(session.give_up("0")) == [StreamReset(stream, 5), DataReceived(error, b"", True)]
    assert session.connection.stream_count == 0
