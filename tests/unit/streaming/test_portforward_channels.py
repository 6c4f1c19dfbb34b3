"""Port-forward over WebSocket channels, in memory."""

from __future__ import annotations

import base64

import pytest

from dispatcher_streaming.portforward import Connect, Data
from dispatcher_streaming.portforward_channels import ChannelForward, most_ports, ports_of
from dispatcher_streaming.spdy.connection import ProtocolError


@pytest.mark.parametrize(
    ("query", "ports"),
    [
        ("port=80", (80,)),
        ("port=80&port=443", (80, 443)),
        ("port=80,443&other=1", (80, 443)),
        ("", ()),
        ("other=80", ()),
        ("port=", None),
        ("port=0", None),
        ("port=65536", None),
        ("port=-1", None),
        ("port=８０", None),
        ("port=80,", None),
        ("port=1&" * 500, None),
    ],
)
def test_ports_of_a_query(query: str, ports: tuple[int, ...] | None) -> None:
    assert ports_of(query) == ports


def test_each_port_has_two_channels_and_is_told_on_both() -> None:
    session = ChannelForward((80, 0x1234), "v4.channel.k8s.io")
    assert session.greeting() == [b"\0\x50\0", b"\1\x50\0", b"\2\x34\x12", b"\3\x34\x12"]
    assert session.opening() == [Connect("0", 80), Connect("1", 0x1234)]
    assert session.receive(b"\2hello") == ([Data("1", b"hello")], [])
    for nothing in (b"", b"\2", b"\1error channel", b"\4no such port", b"\xff\0"):
        assert session.receive(nothing) == ([], [])
    assert session.data("1", b"answer") == [b"\2answer"]
    assert session.data("1", b"") == []


def test_it_is_over_when_every_connection_is() -> None:
    session = ChannelForward((80, 81), "v4.channel.k8s.io")
    assert session.fail("0", "refused") == [b"\1refused"]
    assert session.fail("0", "again") == []
    assert not session.is_over
    assert session.receive(b"\0late") == ([], [])
    assert session.data("0", b"late") == []
    assert session.end("1") == []
    assert session.is_over


def test_the_base64_variant_is_text() -> None:
    session = ChannelForward((80,), "v4.base64.channel.k8s.io")
    assert session.greeting() == [b"0" + base64.b64encode(b"\x50\0"), b"1" + base64.b64encode(b"\x50\0")]
    assert session.receive(b"0" + base64.b64encode(b"hello")) == ([Data("0", b"hello")], [])
    assert session.data("0", b"\0\xff") == [b"0" + base64.b64encode(b"\0\xff")]
    for broken in (b"x", b"0*", b"\0abc"):
        with pytest.raises(ProtocolError):
            session.receive(broken)


def test_channels_are_bytes_or_digits() -> None:
    assert most_ports("v4.channel.k8s.io") == 127
    assert most_ports("v4.base64.channel.k8s.io") == 5
    last = ChannelForward(tuple(range(1, 128)), "v4.channel.k8s.io")
    assert last.greeting()[-1][0] == 253
