"""A guest for the driver's tests: Debian's kernel, and an initramfs of busybox and an init that runs lines of shell.

It stands in for no agent: the driver must work with any guest, and these tests look from inside. The kernel's package
is downloaded and unpacked, never installed, and kept between sessions.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import lzma
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from dispatcher_hyper_vm.drivers import GuestImage
from dispatcher_vm_kit.qmp_client import connect_socket
from tests.lab.child import PartMissingError

CACHE = Path(os.environ.get("DISPATCHER_LAB_CACHE", "/var/tmp/cri-dispatcher-lab"))
INIT = Path(__file__).with_name("mini_init.c")
PACKAGE = "linux-image-amd64"
MODULES: tuple[str, ...] = (
    "virtio_mmio",
    "virtio_console",
    "virtio_net",
    "virtio_scsi",
    "sd_mod",
    "virtio_balloon",
    "virtio_rng",
)
MODULES += ("9p", "9pnet_virtio", "crc32c_generic", "ext4")
ANSWER_S = 300.0


class Talk:
    """A connection to the guest's init."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, agent_socket: Path) -> Talk:
        return cls(*await asyncio.open_unix_connection(sock=await connect_socket(agent_socket)))

    async def ping(self) -> None:
        async with asyncio.timeout(ANSWER_S):
            self._writer.write(b"ping\n")
            await self._reader.readuntil(b"pong\n")

    async def run(self, line: str) -> str:
        """What the line prints; it must succeed."""
        code, text = await self.try_run(line)
        assert code == 0, text
        return text

    async def try_run(self, line: str) -> tuple[int, str]:
        async with asyncio.timeout(ANSWER_S):
            self._writer.write(line.encode() + b"\n")
            text = await self._reader.readuntil(b"\n.END ")
            return int(await self._reader.readline()), text[:-6].decode("utf-8", "replace").strip()

    def tell(self, line: str) -> None:
        """Say a line whose answer will not come."""
        self._writer.write(line.encode() + b"\n")

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


class Gate:
    """See `drivers.GuestGate`."""

    async def settle(self, agent_socket: Path) -> None:
        talk = await Talk.open(agent_socket)
        await talk.ping()
        await talk.run('for c in /sys/devices/system/cpu/cpu[1-9]*/online; do [ ! -e "$c" ] || echo 0 > "$c"; done')
        await talk.close()

    async def timer_rate(self, agent_socket: Path) -> float:
        talk = await Talk.open(agent_socket)
        lines = (await talk.run("grep LOC: /proc/interrupts; sleep 1; grep LOC: /proc/interrupts")).splitlines()
        await talk.close()
        first, second = (sum(int(word) for word in line.split() if word.isdigit()) for line in lines)
        return second - first


def make_guest(folder: Path) -> GuestImage:
    """Build the guest into the folder. Raises PartMissingError where this machine cannot."""
    for tool in ("gcc", "busybox", "dpkg-deb", "apt-get", "apt-cache"):
        if shutil.which(tool) is None:
            raise PartMissingError(f"{tool} is not installed")
    package = _download()
    boot = CACHE / f"{package}.unpacked"
    if not boot.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            _call("dpkg-deb", "-x", str(CACHE / f"{package}.deb"), work)
            os.rename(work, boot)
            os.mkdir(work)
    kernel, initrd = folder / "vmlinux", folder / "initrd"
    kernel.write_bytes(_vmlinux(next((boot / "boot").glob("vmlinuz-*")).read_bytes()))
    init = folder / "init"
    _call("gcc", "-std=gnu11", "-O2", "-static", "-s", "-Wall", "-Wextra", "-Werror", "-o", str(init), str(INIT))
    initrd.write_bytes(gzip.compress(_archive(init.read_bytes(), boot), 1, mtime=0))
    digest = hashlib.sha256(kernel.read_bytes() + initrd.read_bytes()).hexdigest()
    return GuestImage(kernel=kernel, initrd=initrd, digest=digest)


def _call(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PartMissingError(f"{argv[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def _download() -> str:
    """The name of the kernel's package, whose file is in the cache."""
    lines = _call("apt-cache", "depends", PACKAGE).splitlines()
    package = next(line.split()[-1] for line in lines if "Depends:" in line)
    if not (CACHE / f"{package}.deb").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            subprocess.run(["apt-get", "-q", "download", package], cwd=work, capture_output=True, check=False)
            found = list(Path(work).glob("*.deb"))
            if not found:
                raise PartMissingError(f"the package {package} cannot be downloaded")
            os.replace(found[0], CACHE / f"{package}.deb")
    return package


def _vmlinux(image: bytes) -> bytes:
    """The uncompressed kernel inside a bzImage with an XZ payload."""
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    return lzma.LZMADecompressor().decompress(image[start : start + length])


def _archive(init: bytes, boot: Path) -> bytes:
    """A newc archive: init, busybox with its libraries, and the modules in the order of loading."""
    modules = {path.stem.replace("-", "_"): path for path in (boot / "lib/modules").rglob("*.ko")}
    order: list[str] = []

    def add(name: str) -> None:
        data = modules[name].read_bytes()
        at = data.find(b"\0depends=") + 9
        for needed in data[at : data.index(b"\0", at)].decode().split(","):
            if needed and needed not in order:
                add(needed.replace("-", "_"))
        if name not in order:
            order.append(name)

    for name in MODULES:
        add(name)
    busybox = Path(os.path.realpath(shutil.which("busybox") or ""))
    libraries = (
        [word for word in _call("ldd", str(busybox)).split() if word.startswith("/")] if _is_dynamic(busybox) else []
    )
    applets = _call("busybox", "--list").split()
    entries = [(folder, 0o40755, b"") for folder in ("bin", "dev", "m")]
    entries += [(str(parent)[1:], 0o40755, b"") for parent in _parents(libraries)]
    entries += [("init", 0o100755, init), ("bin/busybox", 0o100755, busybox.read_bytes())]
    entries += [(f"bin/{applet}", 0o120777, b"busybox") for applet in applets if applet != "busybox"]
    entries += [(library[1:], 0o100755, Path(library).read_bytes()) for library in libraries]
    entries += [(f"m/{name}.ko", 0o100644, modules[name].read_bytes()) for name in order]
    entries += [("modules", 0o100644, "".join(f"/m/{name}.ko\n" for name in order).encode())]
    packed = b"".join(_entry(*entry) for entry in entries)
    return packed + _entry("dev/console", 0o20600, b"", device=(5, 1)) + _entry("TRAILER!!!", 0, b"")


def _is_dynamic(program: Path) -> bool:
    return b"/ld-linux" in program.read_bytes()[:4096]


def _parents(paths: list[str]) -> list[Path]:
    found = {parent for path in paths for parent in Path(path).parents if parent != Path("/")}
    return sorted(found, key=lambda path: len(path.parts))


def _entry(name: str, mode: int, data: bytes, *, device: tuple[int, int] = (0, 0)) -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    head += b"\0" * (-len(head) % 4)
    return head + data + b"\0" * (-len(data) % 4)
