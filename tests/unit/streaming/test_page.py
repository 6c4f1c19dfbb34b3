"""The page for operators names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from dispatcher_streaming import portforward, portforward_channels, remotecommand
from dispatcher_streaming.config import StreamingConfig

PAGE = (Path(__file__).parents[3] / "docs/streaming.md").read_text()


def test_every_key_stands_in_the_table() -> None:
    keys = [
        name for row in re.findall(r"^\| (`[^|]+)\|", PAGE, re.MULTILINE) for name in re.findall(r"`([a-z_]+)`", row)
    ]
    assert sorted(keys) == sorted(StreamingConfig.model_fields)


def test_every_protocol_is_named() -> None:
    spoken = {*remotecommand.SPDY_PROTOCOLS, *remotecommand.WEBSOCKET_PROTOCOLS, portforward.PROTOCOL}
    spoken |= {*portforward.TUNNELS, *portforward_channels.PROTOCOLS}
    unnamed = {name for name in spoken if f"`{name}`" not in PAGE}
    assert unnamed == {
        *("v3.channel.k8s.io", "v2.channel.k8s.io"),  # "down to"
        *("v4.base64.channel.k8s.io", "base64.channel.k8s.io"),  # "in base64"
    }
