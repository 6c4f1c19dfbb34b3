"""Layers from anywhere: each is refused with a sentence, or becomes a bounded tree with nothing outside it."""

from __future__ import annotations

import gzip
import os
import random
import select
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.harness import Fuzzer, finds
from tests.fuzz.unpack_jail import LAYER_MARK

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.timeout(0),
    pytest.mark.skipif(os.geteuid() != 0, reason="unpacking changes its root folder: needs root"),
]

NAMES = [
    *("a", "b", "d", "d/x", "d/e/f", "d/e", "s", "s/x", "s/d/x", "l", "l/x", "etc", "etc/passwd", "etc/group"),
    *(".wh.a", "d/.wh.x", "d/.wh..wh..opq", ".wh..wh..opq", "s/.wh..wh..opq", ".wh.d", "d/.wh..", "d/.wh...", ".wh."),
    *("s/.wh.file", ".wh..wh.plnk", "../x", "d/../../x", "/abs", "//", ".", "./", "", "..", "../outside/file"),
    *("outside", "outside/file", "s/outside/file", "l/file", "n" * 255, "n" * 256, "d/" * 11 + "x", "d/" * 200),
    *("s/" * 8 + "x", "caf\udce9", "new\nline"),
]
TARGETS = [
    *NAMES,
    *("/", "/outside", "/outside/file", "../outside", "../../../..", "../outside/file", "/root", "/proc/self/root"),
    *("d/e", "/d", "../d", "s/s", "x" * 4096),
]
KINDS = [b"0", b"0", b"0", b"5", b"5", b"2", b"2", b"1", b"1", b"3", b"4", b"6", b"7", b"\0", b"D", b"S", b"x", b"L"]
ATTRIBUTES = {
    "SCHILY.xattr.user.a": "1",
    "SCHILY.xattr.user.overlay.opaque": "y",
    "SCHILY.xattr.trusted.overlay.opaque": "y",
    "SCHILY.xattr.trusted.x": "y",
    "SCHILY.xattr.security.capability": "\x01\x00\x00\x02" + "\0" * 16,
    "GNU.sparse.map": "0,1,9,1",
    "GNU.sparse.size": "16777216",
    "GNU.sparse.major": "1",
    "GNU.sparse.minor": "0",
    "GNU.sparse.realsize": "99999999",
    "size": "1",
    "mtime": "nan",
    "uid": "4294967295",
    "gid": "-1",
    "path": "../../x",
    "linkpath": "/outside/file",
}
SIZES = [b"00000000000\0", b"00000000001\0", b"00000001000\0", b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8,
         b"\xff" * 12, b"            ", b"-0000000001\0"]  # fmt: skip
TOKENS = (
    [item.encode("utf-8", "surrogateescape") + b"\0" for item in NAMES]
    + SIZES
    + [LAYER_MARK, b"ustar\x0000", bytes(512)]
)
PATIENCE_S = 10.0


def generate(chance: random.Random) -> bytes:
    """One to three layers that are nearly right, sometimes compressed."""
    blobs = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        blob = b"".join(_entry(chance) for _ in range(chance.randrange(1, 9))) + bytes(1024)
        blobs.append(gzip.compress(blob, 1) if chance.random() < 0.05 else blob)
    return LAYER_MARK.join(blobs)


def _entry(chance: random.Random) -> bytes:
    info = tarfile.TarInfo(chance.choice(NAMES))
    info.type = chance.choice(KINDS)
    info.linkname = chance.choice(TARGETS) if info.type in {b"1", b"2"} else ""
    info.mode = chance.choice((0o644, 0o755, 0o4755, 0o1777, 0, 0o7777))
    info.uid, info.gid = chance.choice((0, 0, 1000, 65534, 2**21)), chance.choice((0, 0, 1000))
    data = chance.randbytes(chance.choice((0, 0, 1, 20, 600)))
    info.size = len(data) if info.isreg() else 0
    keys = chance.sample([*ATTRIBUTES], chance.choice((0, 0, 0, 1, 2, 3)))
    if chance.random() < 0.05:
        keys += ["GNU.sparse.map", "GNU.sparse.size"]
    info.pax_headers = {key: ATTRIBUTES[key] for key in keys}
    form: Any = tarfile.PAX_FORMAT if info.pax_headers else chance.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT))
    try:
        block = info.tobuf(form, "utf-8", "surrogateescape")
    except (ValueError, UnicodeError):
        block = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    if chance.random() < 0.05:
        block = block[:-388] + chance.choice(SIZES) + block[-376:]
    return block + (data + bytes(-len(data) % 512) if info.isreg() else b"")


def mend(layer: bytes) -> bytes:
    """Put checksums right after a mutation: else hardly any input gets past them."""
    blocks = bytearray(layer + bytes(-len(layer) % 512))
    for start in range(0, len(blocks), 512):
        if blocks[start + 257 : start + 262] == b"ustar":
            blocks[start + 148 : start + 156] = b" " * 8
            blocks[start + 148 : start + 156] = b"%06o\0 " % sum(blocks[start : start + 512])
    return bytes(blocks)


class Jail:
    """The unpacking process; started anew after each finding."""

    def __init__(self, folder: Path, fault: str = "") -> None:
        self._folder = folder
        self._fault = fault
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, data: bytes) -> str:
        """The property: an answer in time, without a fault."""
        data = LAYER_MARK.join(item if item[:2] == b"\x1f\x8b" else mend(item) for item in data.split(LAYER_MARK))
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(struct.pack("<I", len(data)) + data)
            process.stdin.flush()
            answer = self._read(process)
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.close()
            raise AssertionError("the worker died, or was still busy after ten seconds")
        if answer.startswith("FAULT"):
            self.close()
            raise AssertionError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._count += 1
        arena = self._folder / str(self._count)
        arena.mkdir()
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-X", "utf8", "-m", "tests.fuzz.unpack_jail", str(arena), self._fault],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
        )
        return self._process

    def _read(self, process: subprocess.Popen[bytes]) -> str | None:
        assert process.stdout is not None
        got = BytesIO()
        wanted = 4
        while got.tell() < wanted:
            ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
            data = os.read(process.stdout.fileno(), wanted - got.tell()) if ready else b""
            if not data:
                return None
            got.write(data)
            if got.tell() == 4:
                wanted = 4 + struct.unpack("<I", got.getvalue()[:4])[0]
        return got.getvalue()[4:].decode()


@pytest.fixture
def jails(tmp_path: Path) -> Iterator[Any]:
    """Makes jails and closes them."""
    made: list[Jail] = []

    def make(fault: str = "") -> Jail:
        made.append(Jail(tmp_path, fault))
        return made[-1]

    yield make
    for jail in made:
        jail.close()


def make_fuzzer(jail: Jail, **changes: Any) -> Fuzzer:
    """The fuzzer of layers."""
    return Fuzzer(check=jail.check, corpus="unpack", tokens=TOKENS, generate=generate, **changes)


def test_layers_are_refused_or_become_a_bounded_tree(jails: Any) -> None:
    """Nothing outside the root folder changes, no input keeps the worker busy, and every tree can be removed."""
    print(make_fuzzer(jails()).run())


@pytest.mark.parametrize("fault", ["no root folder", "attributes", "devices", "whiteouts", "depth", "bytes", "endless"])
def test_planted_faults_are_found(jails: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of its defences the worker is caught within seconds."""
    if fault == "endless":
        monkeypatch.setattr("tests.fuzz.fuzz_unpack.PATIENCE_S", 1.0)
    finds(make_fuzzer(jails(fault), seconds=20, seed=1), fault)
