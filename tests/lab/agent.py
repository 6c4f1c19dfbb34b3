"""The real agent on this host: process 1 of fresh namespaces, with a UNIX socket in place of the virtio-serial port."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dispatcher_hyper_vm.agent.values import ContainerSetup, Rootfs
from dispatcher_hyper_vm.guest.exec import compile_agent
from tests.lab.child import PartMissingError
from tests.lab.images import base_tree

_NAMESPACES = ["--mount", "--uts", "--ipc", "--net", "--cgroup", "--pid", "--fork", "--kill-child"]
_ALL_CAPS = ("bounding", "permitted", "effective")
MOUNTS: tuple[dict[str, Any], ...] = (
    {"destination": "/proc", "type": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/dev", "type": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    },
    {"destination": "/sys", "type": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
)


def process(args: Sequence[str], **fields: Any) -> dict[str, Any]:
    """An OCI process with few rights."""
    capabilities = fields.pop("caps", ("CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_MKNOD"))
    return {
        "args": list(args),
        "env": ["PATH=/bin"],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "capabilities": {key: list(capabilities) for key in _ALL_CAPS},
        "noNewPrivileges": True,
        **fields,
    }


def spec(args: Sequence[str], *, linux: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """An OCI specification as the runtime makes it, in small. `mounts` are added to the usual ones."""
    mounts = [*MOUNTS, *fields.pop("mounts", ())]
    return {
        "process": process(args, **fields.pop("process", {})),
        "mounts": mounts,
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}], **(linux or {})},
        **fields,
    }


def container(number: str, args: Sequence[str], **fields: Any) -> ContainerSetup:
    """A container whose root is the busybox folder."""
    keys = ("seccomp", "terminal", "stdin", "stdin_once")
    own = {key: fields.pop(key) for key in keys if key in fields}
    return ContainerSetup(id=number, spec=spec(args, **fields), rootfs=Rootfs(folder="/img"), **own)


class HostAgent:
    """One agent that runs until `close`. `root` is its own root, with the containers' image in `img`."""

    def __init__(self, program: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="agent-"))
        self.root = self.folder / "root"
        self.socket = str(self.folder / "agent.sock")
        self._cgroup = _cgroup2() / f"cri-agent-{os.getpid()}-{self.folder.name}"
        for name in ("proc", "sys", "dev", "run", "img"):
            (self.root / name).mkdir(parents=True)
        unpack_image(self.root / "img")
        self._cgroup.mkdir()
        self._log = (self.folder / "log").open("wb")
        self._process = subprocess.Popen(
            ["unshare", *_NAMESPACES, str(program), "--socket", self.socket, "--root", str(self.root)],
            preexec_fn=self._enter,  # noqa: PLW1509 - no threads yet that matter, and the child only writes its pid
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        )

    def _enter(self) -> None:
        (self._cgroup / "cgroup.procs").write_text(str(os.getpid()))

    def log(self) -> str:
        """What it has said on its console."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def census(self) -> list[str]:
        """The cgroups of containers that there are."""
        return sorted(path.name for path in (self._cgroup / "pod").iterdir() if path.is_dir())

    def is_running(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it, with all that runs in it. Nothing of it stays."""
        self._process.send_signal(signal.SIGKILL)  # its namespaces' first process goes with it
        self._process.wait()
        self._log.close()
        deadline = time.monotonic() + 10
        while self._cgroup.exists() and time.monotonic() < deadline:
            for path in sorted(self._cgroup.rglob("*"), reverse=True):
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()
            time.sleep(0.01)
        shutil.rmtree(self.folder)


def build_agent(folder: Path, *, checked: bool) -> Path:
    """Compile the agent, or say what is missing."""
    if shutil.which("gcc") is None or os.geteuid() != 0:
        raise PartMissingError("gcc and root are needed for the agent")
    program = folder / ("agent-checked" if checked else "agent")
    compile_agent(program, checked=checked)
    return program


@contextlib.contextmanager
def running(program: Path) -> Iterator[HostAgent]:
    """An agent for the time of a test. What a sanitizer has found fails the test."""
    agent = HostAgent(program)
    try:
        yield agent
        log = agent.log()
        assert "Sanitizer" not in log, log
        assert "runtime error" not in log, log
        assert agent.is_running(), log
    finally:
        agent.close()


def _cgroup2() -> Path:
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise PartMissingError("this machine has no cgroup2 mount")


@functools.cache
def image_tar() -> bytes:
    """The image of the containers: busybox and a few programs, as the other tests have it."""
    return base_tree().tar()


def unpack_image(folder: Path) -> None:
    """Put the image into a folder."""
    with tarfile.open(fileobj=io.BytesIO(image_tar())) as archive:
        # Python 3.11 before its fourth update knows no filters, and newer ones complain where none is chosen.
        archive.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
        archive.extractall(folder)
