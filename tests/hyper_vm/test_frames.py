"""The agent's parsers: the golden frames that the host's side has as well, however they are cut, and any rubbish between."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dispatcher_hyper_vm.agent.protocol import PREAMBLE, Frame, FrameType, Message, encode
from tests.lab.frames import ask, build_frames

pytestmark = pytest.mark.lab

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "agent_frames.json").read_text())


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness."""
    return build_frames(tmp_path_factory.mktemp("frames"))


def line(item: dict[str, Any]) -> str:
    """How the harness prints a golden frame."""
    numbers = (item[key] for key in ("type", "flags", "source", "id", "seq", "time_ns"))
    return f"frame {' '.join(map(str, numbers))} {item['payload']} {item['wire']}"


@pytest.mark.parametrize("piece", [0, 1, 7, 33, 4096])
def test_golden_frames(frames: Path, piece: int) -> None:
    """Decoded to the same values, and encoded to the same bytes."""
    wire = b"".join(bytes.fromhex(item["wire"]) for item in GOLDEN)
    assert ask(frames, wire, str(piece)) == [*map(line, GOLDEN), "skipped 0"]


def test_a_cut_frame_is_dropped_and_all_behind_the_zeros_is_read(frames: Path) -> None:
    """Wherever it was cut, and though its payload holds what looks like frames."""
    inner = encode(Frame(type=FrameType.REQUEST, id=1, seq=1, payload=b"evil"))
    whole = encode(Frame(type=FrameType.DATA, id=3, seq=9, payload=inner * 3))
    for cut in [*range(1, 80), len(whole) - 1]:
        found = ask(frames, whole[:cut] + PREAMBLE + bytes.fromhex(GOLDEN[0]["wire"]))
        assert found[:-1] == [line(GOLDEN[0])], cut


def test_json_is_read_as_python_reads_it(frames: Path) -> None:
    """Names, texts with any byte but zero, numbers; and what is no JSON is refused."""
    body = {"a": [1, -2, True, None, {"b": 'ü€𝄞\n"\\'}], "c": "\udcff\udc80", "d": 2**63, "e": 1.5}
    (found,) = ask(frames, Message(body).pack()[4:], "json")
    assert found.startswith('(6 0 (5 0 "a"(3 1 )(3 -2 )(2 0 )(0 0 )(6 0 (4 0 "b"')
    assert f'(3 {2**63 - 1} "d")(3 1 "e"))' in found
    for bad in (
        b"",
        b"{",
        b'{"a"}',
        b"[1,]",
        b'"\\u0000"',
        b'"\\ud800"',
        b'"\x01"',
        b"nul",
        b"{}x",
        b"[" * 60,
        b'"\\',
        b"-",
    ):
        assert ask(frames, bad, "json")[0].startswith("refused"), bad


def test_rubbish_never_hurts(frames: Path) -> None:
    """Frames with bytes changed, taken away, doubled and mixed; nothing is made up: what is found was sent."""
    chance = random.Random(11)
    for _ in range(60):
        data = bytearray()
        for item in chance.choices(GOLDEN, k=12):
            wire = bytearray.fromhex(item["wire"])
            for _ in range(chance.randint(0, 3)):
                at = chance.randrange(len(wire))
                wire[at : at + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 6))
            data += wire
        for found in ask(frames, bytes(data), str(chance.choice([0, 1, 13])))[:-1]:
            assert bytes.fromhex(found.split(" ")[-1]) in data
