"""A small mutation fuzzer: bytes in, a property that must hold, feedback by what the target answered.

A fuzzer hands every input to a check, which returns a short word for what happened ("refused: not JSON", "ok: 2
plugins") and raises for what must not happen. An input with a word that was not seen before joins the pool that is
mutated on: that leads deep into a parser without instrumenting it. All choices come from one seed; the time limit
only says how far it gets.

    FUZZ_SECONDS   how long each fuzzer runs (5)
    FUZZ_SEED      the seed (a fixed one)
    FUZZ_KEEP      set to 1 to add inputs with new words to the corpus folder

An input that failed is made smaller, printed, and belongs into the corpus once the fault is mended.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Check = Callable[[bytes], str]
CORPUS = Path(__file__).with_name("corpus")
_POOL_LIMIT = 4000
_INPUT_LIMIT = 1 << 16


class FuzzFailure(AssertionError):
    """An input for which the property does not hold; `data` is the smallest found."""

    def __init__(self, data: bytes, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}\nfor the input {data!r}")
        self.data = data


@dataclass(slots=True, kw_only=True)
class Fuzzer:
    """One target. `corpus` names a folder below tests/fuzz/corpus; `tokens` are spliced into inputs."""

    check: Check
    corpus: str
    tokens: Sequence[bytes] = ()
    generate: Callable[[random.Random], bytes] | None = None
    seconds: float = field(default_factory=lambda: float(os.environ.get("FUZZ_SECONDS", "5")))
    seed: int = field(default_factory=lambda: int(os.environ.get("FUZZ_SEED", "20180418")))

    def run(self) -> str:
        """Run the corpus, then mutate until the time is over. Returns one line of what was done.

        Raises:
            FuzzFailure: the property does not hold.
        """
        chance = random.Random(self.seed)
        deadline = time.monotonic() + self.seconds
        pool: list[bytes] = []
        words: set[str] = set()
        count = 0
        for data in self._inputs(chance, pool, deadline):
            count += 1
            word = self._try(data)
            if word not in words:
                words.add(word)
                if len(pool) < _POOL_LIMIT:
                    pool.append(data)
                    self._keep(data)
        return f"{self.corpus}: {count} inputs, {len(words)} different answers, seed {self.seed}"

    def _inputs(self, chance: random.Random, pool: list[bytes], deadline: float) -> Iterator[bytes]:
        yield b""
        for path in sorted((CORPUS / self.corpus).glob("*")):
            yield path.read_bytes()
        while time.monotonic() < deadline:
            fresh = self.generate is not None and chance.random() < 0.3
            data = self.generate(chance) if fresh and self.generate else chance.choice(pool)
            for _ in range(min(chance.getrandbits(3), chance.getrandbits(3))):
                data = self._mutate(data, chance, pool)
            yield data[:_INPUT_LIMIT]

    def _mutate(self, data: bytes, chance: random.Random, pool: list[bytes]) -> bytes:
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + (chance.getrandbits(4) if chance.random() < 0.7 else chance.getrandbits(10)))
        kind = chance.randrange(8)
        if kind == 0:
            return data[:start] + data[end:]
        if kind == 1:
            return data[:start] + data[start:end] * chance.randrange(2, 5) + data[end:]
        if kind == 2 and self.tokens:
            return data[:start] + chance.choice(self.tokens) + data[start:]
        if kind == 3 and self.tokens:
            return data[:start] + chance.choice(self.tokens) + data[end:]
        if kind == 4:
            other = chance.choice(pool)
            cut = chance.randrange(len(other) + 1)
            return data[:start] + other[cut:]
        if kind == 5:
            return data[:start] + chance.randbytes(chance.randrange(1, 5)) + data[end:]
        if kind == 6 and self.tokens:
            old, new = chance.choice(self.tokens), chance.choice(self.tokens)
            return data.replace(old, new, chance.randrange(1, 3))
        if start < len(data):
            return data[:start] + bytes([data[start] ^ 1 << chance.randrange(8)]) + data[start + 1 :]
        return data

    def _try(self, data: bytes) -> str:
        try:
            return self.check(data)
        except Exception as error:
            smallest = self._shrink(data, type(error))
            raise FuzzFailure(smallest, error) from error

    def _shrink(self, data: bytes, kind: type[Exception]) -> bytes:
        """Cut pieces out while the same kind of failure stays, for at most two seconds."""
        deadline = time.monotonic() + 2
        size = max(1, len(data) // 2)
        while size and time.monotonic() < deadline:
            for start in range(0, len(data), size):
                shorter = data[:start] + data[start + size :]
                if self._fails(shorter, kind):
                    data = shorter
                    break
            else:
                size //= 2
        return data

    def _fails(self, data: bytes, kind: type[Exception]) -> bool:
        try:
            self.check(data)
        except Exception as error:  # noqa: BLE001 - whatever the fault raises
            return isinstance(error, kind)
        return False

    def _keep(self, data: bytes) -> None:
        if os.environ.get("FUZZ_KEEP") == "1" and data:
            folder = CORPUS / self.corpus
            folder.mkdir(parents=True, exist_ok=True)
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def finds(fuzzer: Fuzzer, planted: str) -> None:
    """Assert that the fuzzer finds a fault that was planted into its target."""
    try:
        report = fuzzer.run()
    except FuzzFailure:
        return
    raise AssertionError(f"the planted fault was not found: {planted} ({report})")
