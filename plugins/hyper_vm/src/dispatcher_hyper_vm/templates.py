"""Templates: booted guests, kept as a memory file and a device state, from which machines start in a tenth of a second.

Theory of operation. One template stands for everything that its clones cannot change: kernel, initramfs with the agent,
QEMU, all of its arguments, the size class, and who may share it. That is its key, so nothing is ever invalidated: what
differs has another key, and what is no longer asked for is evicted. The first who asks has it built in the background;
everybody who asks meanwhile waits for the same build, up to a limit, and then starts cold with a reason. A build that
failed is not tried again for a while.

The memory file is sealed against writing once it is complete: a clone maps it privately and cannot change it, even if
its monitor is taken over. It lives as long as this process or a clone has it open, and counts while we hold it.

Invariant: what a template holds came from the guest image alone, never from a pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dispatcher.api import effect
from dispatcher.errors import DispatcherError

_LOG = logging.getLogger(__name__)
_ADD_SEALS = 1033
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_WRITE = 1, 2, 4, 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 1800.0
_BLOCK = 512


class TemplateRefused(DispatcherError):
    """A guest came up, but must not become a template; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLimits:
    """Bounds of the store.

    Attributes:
        max_count, max_bytes: how many templates are kept, and how much memory they may hold together.
        min_available_bytes: no template is built when the host has less memory than this.
        build_s: how long a build may take.
        wait_s: how long a start waits for a build before it boots cold.
    """

    max_count: int = 8
    max_bytes: int = 2 << 30
    min_available_bytes: int = 512 << 20
    build_s: float = 120.0
    wait_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateKey:
    """What a template is of. `digest` names all of it; the rest is for people."""

    digest: str
    memory_bytes: int
    vcpus: int
    domain: str = ""


@dataclass(slots=True)
class Template:
    """A template that is ready. `ram_fd` is the sealed memory file, open for this object's life."""

    key: TemplateKey
    ram_fd: int
    state: bytes
    build_seconds: float
    built_at: float = field(default_factory=time.time)
    used_at: float = field(default_factory=time.time)
    clones: int = 0

    @property
    def bytes_held(self) -> int:
        """What it costs: the pages that the guest had touched, and the devices."""
        return os.fstat(self.ram_fd).st_blocks * _BLOCK + len(self.state)


@dataclass(slots=True)
class _Failure:
    reason: str
    at: float
    pause_s: float


Builder = Callable[[TemplateKey], Awaitable[Template]]


class Templates:
    """The templates of a driver. Not for use by several threads."""

    def __init__(self, limits: TemplateLimits, *, available_bytes: Callable[[], int] | None = None) -> None:
        self._limits = limits
        self._available_bytes = available_bytes or read_available_bytes
        self._ready: dict[str, Template] = {}
        self._builds: dict[str, asyncio.Task[Template]] = {}
        self._failures: dict[str, _Failure] = {}
        self._evicted = 0

    async def get(self, key: TemplateKey, build: Builder) -> tuple[Template | None, str]:
        """The template of this key, or None with the reason why not (yet).

        The first call starts the build; a cancelled caller leaves it running. A returned template is only valid until
        the next await: take what is needed of it, such as a copy of its descriptor, at once.
        """
        if (found := self._ready.get(key.digest)) is not None:
            return found, ""
        if (reason := self._refusal(key)) and key.digest not in self._builds:
            return None, reason
        task = self._builds.get(key.digest)
        if task is None:
            task = self._builds[key.digest] = self._start(key, build)
        done, _ = await asyncio.wait([task], timeout=self._limits.wait_s)
        if not done:
            return None, f"its template was not ready within {self._limits.wait_s:g} s"
        found = self._ready.get(key.digest)
        return found, "" if found is not None else self._why(key)

    def begin(self, key: TemplateKey, build: Builder) -> None:
        """Have a template built without waiting for it. Idempotent."""
        if key.digest not in self._ready and key.digest not in self._builds and not self._refusal(key):
            self._builds[key.digest] = self._start(key, build)

    def _refusal(self, key: TemplateKey) -> str:
        failure = self._failures.get(key.digest)
        if failure is not None and time.monotonic() < failure.at + failure.pause_s:
            return f"its template could not be made: {failure.reason}"
        if self._limits.max_count < 1:
            return "no templates are kept"
        if self._available_bytes() < self._limits.min_available_bytes:
            return "the host has too little memory for a template"
        return ""

    def _why(self, key: TemplateKey) -> str:
        failure = self._failures.get(key.digest)
        return f"its template could not be made: {failure.reason}" if failure else "its template is gone again"

    def _start(self, key: TemplateKey, build: Builder) -> asyncio.Task[Template]:
        # In an empty context: the build belongs to nobody's call.
        task = asyncio.get_running_loop().create_task(
            self._build(key, build), name=f"template {key.digest[:12]}", context=contextvars.Context()
        )
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _build(self, key: TemplateKey, build: Builder) -> Template:
        try:
            async with asyncio.timeout(self._limits.build_s):
                made = await build(key)
        except Exception as error:
            if isinstance(error, TimeoutError):
                reason = f"the guest was not ready within {self._limits.build_s:g} s"
            elif isinstance(error, DispatcherError):
                reason = error.message
            else:
                reason = f"an error of ours ({type(error).__name__})"
                _LOG.exception("making the template %s failed", key.digest[:12])
            before = self._failures.get(key.digest)
            pause_s = min(_LONGEST_PAUSE_S, before.pause_s * 2) if before else _FIRST_PAUSE_S
            self._failures[key.digest] = _Failure(reason=reason, at=time.monotonic(), pause_s=pause_s)
            _LOG.warning("no template for guests of %d MiB: %s", key.memory_bytes >> 20, reason)
            raise
        finally:
            self._builds.pop(key.digest, None)
        self._failures.pop(key.digest, None)
        self._ready[key.digest] = made
        self._evict(keep=key.digest)
        return made

    def _evict(self, *, keep: str) -> None:
        """Let the least recently used go until the bounds hold; the newest always stays."""
        for digest in sorted(self._ready, key=lambda each: self._ready[each].used_at):
            held = sum(each.bytes_held for each in self._ready.values())
            if len(self._ready) <= self._limits.max_count and held <= self._limits.max_bytes:
                return
            if digest != keep:
                self._drop(digest)
                self._evicted += 1

    def _drop(self, digest: str) -> None:
        template = self._ready.pop(digest)
        close_ram(template.ram_fd)

    def note_clone(self, digest: str, change: int) -> None:
        """Count a machine that started from a template (+1) or ended (-1); for reports only."""
        if (template := self._ready.get(digest)) is not None:
            template.clones += change
            template.used_at = time.time()

    def discard(self, digest: str, reason: str) -> None:
        """Drop a template from which a machine could not start, and do not rebuild it at once."""
        if digest in self._ready:
            self._drop(digest)
        self._failures[digest] = _Failure(reason=reason, at=time.monotonic(), pause_s=_FIRST_PAUSE_S)

    def report(self) -> dict[str, Any]:
        """What there is, as data."""
        return {
            "templates": [_describe(each) for each in self._ready.values()],
            "building": sorted(digest[:12] for digest in self._builds),
            "failures": {digest[:12]: each.reason for digest, each in self._failures.items()},
            "bytes": sum(each.bytes_held for each in self._ready.values()),
            "evicted": self._evicted,
            "limits": {"count": self._limits.max_count, "bytes": self._limits.max_bytes},
        }

    async def aclose(self) -> None:
        """Stop builds and let go of all templates; machines that came from them run on."""
        builds = list(self._builds.values())
        for task in builds:
            task.cancel()
        await asyncio.gather(*builds, return_exceptions=True)
        for digest in list(self._ready):
            self._drop(digest)


def _describe(template: Template) -> Mapping[str, Any]:
    return {
        "key": template.key.digest[:12],
        "memory_bytes": template.key.memory_bytes,
        "vcpus": template.key.vcpus,
        "domain": template.key.domain,
        "bytes_held": template.bytes_held,
        "state_bytes": len(template.state),
        "clones": template.clones,
        "built_at": template.built_at,
        "build_seconds": round(template.build_seconds, 3),
        "used_at": template.used_at,
    }


# ------------------------------------------------------------------------------------------------------ the memory file
@effect("hyper_vm.make_ram")
def make_ram(size: int) -> int:
    """Make an empty memory file of this size that can be sealed; it takes memory only where it is written."""
    descriptor = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@effect("hyper_vm.seal_ram")
def seal_ram(descriptor: int) -> None:
    """Seal it for good against every change. Nothing may have it mapped for writing any more.

    Raises:
        OSError: something still has.
    """
    fcntl.fcntl(descriptor, _ADD_SEALS, _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW | _SEAL_WRITE)


def close_ram(descriptor: int) -> None:
    """Let go of a memory file; it lives on in those who have it."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def read_available_bytes() -> int:
    """The host's MemAvailable."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
