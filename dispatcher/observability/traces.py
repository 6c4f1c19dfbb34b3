"""Keeps what was recorded of recent calls, for `dispatcher trace`, and hands it to an exporter where one is configured.

Theory of operation. A recorded tree is put into a queue, and a thread does the rest beside the loop: it turns the tree
into one line of JSON, keeps the newest lines in memory, appends them to a file, and exports. The file is not synced, and
no call waits for it: it survives the end of the daemon by whatever signal, but not always that of the machine. It has two
generations, so it is bounded; a line that was cut off is skipped when it is read. A call in flight is shown as far as it
has come, from memory alone.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from dispatcher.observability.redaction import redact_text
from dispatcher.spans import Fact, Recording, Span, Tree

_log = logging.getLogger(__name__)

# The calls that together are the start of a pod.
START_RPCS: Final = frozenset({"RunPodSandbox", "PullImage", "CreateContainer", "StartContainer"})

MAX_LINE: Final = 64 * 1024
MAX_KEPT_BYTES: Final = 4 << 20
MAX_FILE_BYTES: Final = 4 << 20
_MAX_UNFINISHED: Final = 256

Export = Callable[[Tree, Sequence[Span]], None]


def plain_facts(span: Span) -> dict[str, Fact]:
    """Return the facts of a span with secrets cut out."""
    return {key: redact_text(value) if isinstance(value, str) else value for key, value in span.facts.items()}


def _ms(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def as_dict(tree: Tree, spans: Sequence[Span]) -> dict[str, Any]:
    """Return a recorded call as plain JSON: times in ms since its beginning, secrets cut out.

    `depth` is how deep a step lies below the call; steps stand in the order in which they began.
    """
    now_ns = tree.now_ns()
    root = spans[0]
    depths: dict[Span | None, int] = {root: 0}
    steps = []
    for span in spans[1:]:
        depths[span] = depths.get(span.parent, 0) + 1
        is_running = span.ended_ns < 0
        busy_ns = span.busy_ns + (now_ns - span.resumed_ns if is_running else 0)
        described: dict[str, Any] = {
            "name": span.name,
            "depth": depths[span],
            "offset_ms": _ms(span.started_ns),
            "duration_ms": _ms(busy_ns),
        }
        if span.count > 1:
            described["count"] = span.count
        if is_running:
            described["running"] = True
        if span.error:
            described["error"] = redact_text(span.error)
        if span.facts:
            described["facts"] = plain_facts(span)
        steps.append(described)
    is_running = not tree.closed
    return {
        "call": root.name,
        "began_ns": tree.began_ns,
        "duration_ms": _ms(now_ns if is_running else max(span.ended_ns for span in spans)),
        "state": "running" if is_running else ("failed" if root.error else "ok"),
        "error": redact_text(root.error),
        "facts": plain_facts(root),
        "steps": steps,
        "dropped": tree.dropped,
    }


def _as_line(tree: Tree, spans: Sequence[Span]) -> bytes:
    shown = as_dict(tree, spans)
    line = json.dumps(shown, separators=(",", ":")).encode()
    while len(line) > MAX_LINE:
        kept = len(shown["steps"]) // 2
        shown["dropped"] += len(shown["steps"]) - kept
        shown["steps"] = shown["steps"][:kept]
        line = json.dumps(shown, separators=(",", ":")).encode()
    return line


class TraceLog:
    """The recorded calls of one daemon.

    Args:
        file: where lines are kept over a restart, with a second generation beside it.
        keep: how many calls are kept; 0 keeps none.
        export: takes each finished call, on the thread of this object; None for nothing.
    """

    def __init__(self, file: Path, *, keep: int, export: Export | None = None) -> None:
        self._file = file
        self._keep = keep
        self._export = export
        self._lock = threading.Lock()
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._unfinished: dict[int, Tree] = {}
        self._queue: queue.SimpleQueue[Tree | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._fd = -1
        self._wrote = 0
        self._complained = False

    @property
    def takes_all(self) -> bool:
        """True when calls of every kind are wanted, since they are exported."""
        return self._export is not None

    def wants(self, rpc: str) -> bool:
        """Say whether calls of this RPC are to be recorded."""
        return self.takes_all or (self._keep > 0 and rpc in START_RPCS)

    def record(self, rpc: str, *, remote: str = "", **facts: Fact) -> Recording:
        """Return a recording for one call; see `dispatcher.spans`."""
        recording = Recording(rpc, self._on_end, remote=remote, **facts)
        tree = recording.tree
        with self._lock:
            while len(self._unfinished) >= _MAX_UNFINISHED:  # calls that hang: the oldest are shown no more
                del self._unfinished[next(iter(self._unfinished))]
            self._unfinished[id(tree)] = tree
        return recording

    def start(self) -> None:
        """Read what an earlier daemon kept, and begin to work."""
        for path in (self._older, self._file):
            for line in _read_lines(path):
                self._keep_line(line)
        self._thread = threading.Thread(target=self._work, name="traces", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is waiting, and end. Idempotent."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._queue.put(None)
            thread.join(timeout=5.0)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def render(self) -> str:
        """Return all kept calls as a JSON list, the oldest first, those in flight last."""
        with self._lock:
            lines = [line.decode() for line in self._lines]
            unfinished = list(self._unfinished.values())
        for tree in unfinished:
            spans = tree.spans.copy()
            if tree.root.name in START_RPCS:
                lines.append(_as_line(tree, spans).decode())
        return f"[{','.join(lines)}]"

    def _on_end(self, tree: Tree) -> None:
        self._queue.put(tree)

    @property
    def _older(self) -> Path:
        return self._file.with_name(f"{self._file.name}.1")

    def _work(self) -> None:
        while (tree := self._queue.get()) is not None:
            try:
                self._finish(tree)
            except Exception as error:  # noqa: BLE001 - a call that was not kept harms nobody
                self._complain(error)

    def _finish(self, tree: Tree) -> None:
        spans = tree.spans.copy()
        try:
            if self._keep > 0 and tree.root.name in START_RPCS:
                line = _as_line(tree, spans)
                self._keep_line(line)
                self._write(line)
        finally:
            with self._lock:
                self._unfinished.pop(id(tree), None)
            tree.take_spans()
        if self._export is not None:
            self._export(tree, spans)

    def _keep_line(self, line: bytes) -> None:
        with self._lock:
            self._lines.append(line)
            self._bytes += len(line)
            while len(self._lines) > self._keep or self._bytes > MAX_KEPT_BYTES:
                self._bytes -= len(self._lines.popleft())

    def _write(self, line: bytes) -> None:
        if self._fd < 0 or self._wrote + len(line) >= MAX_FILE_BYTES:
            self._next_file()
        self._wrote += os.write(self._fd, line + b"\n")

    def _next_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            os.replace(self._file, self._older)
        self._fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._wrote = os.fstat(self._fd).st_size
        if self._wrote:  # what a dying daemon may have cut off ends here
            self._wrote += os.write(self._fd, b"\n")

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("calls are not traced", extra={"file": str(self._file), "cause": str(error)})


def _read_lines(path: Path) -> list[bytes]:
    """Return the whole lines of a file that are JSON objects; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + MAX_LINE)
    except OSError:
        return []
    return [line for line in content.split(b"\n") if _is_call(line)]


def _is_call(line: bytes) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and isinstance(found.get("steps"), list) and isinstance(found.get("facts"), dict)
