"""The process in which layers are unpacked for fuzzing: one input after the other, each into a fresh root folder.

It stands in an arena of its own (a chroot with a canary beside the root folder), so that an escape is seen and does no
harm. Frames on standard input and output: a 4-byte length, then layers, or the answer. The second argument breaks the
code under test on purpose, to show that the fuzzer notices.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
import sys
import tarfile
from dataclasses import replace
from io import BytesIO

import zstandard  # noqa: F401  # loaded before the root folder changes

from dispatcher_images import confine, layers, unpack, worker
from dispatcher_images.hostile import BadImage, Limits

LAYER_MARK = b"\nNEXT LAYER\n"
LIMITS = Limits(
    max_bytes=4 << 20,
    max_file_bytes=4 << 20,
    max_entries=300,
    max_depth=12,
    max_ratio=100,
    ratio_floor_bytes=256 << 10,
    max_header_bytes=8 << 10,
    max_account_bytes=8 << 10,
)
_CANARY = b"untouched"
_XATTRS = {"security.capability"}


def main() -> None:
    """Serve until standard input ends."""
    arena, fault = sys.argv[1:]
    os.makedirs(f"{arena}/outside")
    with open(f"{arena}/outside/file", "wb") as canary:
        canary.write(_CANARY)
    os.chmod(f"{arena}/outside/file", 0o640)
    confine.die_with_parent(os.getppid())
    # The heap outlives one input here, processor time is the fuzzer's to watch, and sizes are the code's.
    confine.limit_resources(replace(LIMITS, max_cpu_s=1 << 20, max_memory_bytes=2 << 30, max_file_bytes=1 << 40))
    confine.enter_root(arena)
    # More than the real worker has: what it must not do has to be refused by the code, not only by the kernel.
    confine.keep_capabilities(confine.UNPACK_CAPABILITIES | {18, 21, 27})  # chroot, admin (attributes), mknod
    used = plant(fault)
    top = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    while length := sys.stdin.buffer.read(4):
        data = sys.stdin.buffer.read(struct.unpack("<I", length)[0])
        answer = run(data, top, used).encode("utf-8", "backslashreplace")
        sys.stdout.buffer.write(struct.pack("<I", len(answer)) + answer)
        sys.stdout.buffer.flush()


def run(data: bytes, top: int, limits: Limits) -> str:
    """Unpack one input and check what became of the arena. The answer begins with "FAULT" for what must not be."""
    os.mkdir("/root", 0o755)
    confine.enter_root("/root")
    blobs = data.split(LAYER_MARK)
    try:
        try:
            answer = attempt(blobs, limits)
        finally:
            os.fchdir(top)
            os.chroot(".")
        fault = inspect()
    except Exception as error:  # noqa: BLE001 - everything else is a finding
        return f"FAULT: {type(error).__name__}: {error}"
    finally:
        try:
            shutil.rmtree("/root")
        except OSError as error:
            return f"FAULT: the tree cannot be removed: {error}"
    return f"FAULT: {fault}" if fault else answer


def attempt(blobs: list[bytes], limits: Limits) -> str:
    """Look for account files, then unpack."""
    try:
        wanted = {"etc/passwd", "etc/group"}
        for blob in blobs:
            reader = layers.LayerReader(BytesIO(blob), limits)
            digest = reader.finish()
            found, _gone = worker._find_accounts(BytesIO(blob), digest, wanted, limits)
            if any(len(content) > LIMITS.max_account_bytes for content in found.values()):
                return "FAULT: a huge account file"
    except (BadImage, worker._IndirectError):
        pass
    unpacker = unpack.Unpacker(limits)
    try:
        for blob in blobs:
            unpacker.apply(BytesIO(blob))
    except BadImage as error:
        return "refused: " + re.sub(r"\d+", "", str(error))
    report = unpacker.report
    return (
        f"ok: {len(blobs)} {min(report.entries, 12)} {report.file_bytes.bit_length()} {sorted(report.skipped.items())}"
    )


def inspect() -> str:
    """What is wrong in the arena, or ""."""
    if sorted(os.listdir("/")) != ["outside", "root"]:
        return f"something was made outside: {sorted(os.listdir('/'))}"
    if os.listdir("/outside") != ["file"]:
        return "something was made or removed in the neighbour folder"
    with open("/outside/file", "rb") as canary:
        status = os.fstat(canary.fileno())
        if canary.read() != _CANARY or (stat.S_IMODE(status.st_mode), status.st_uid, status.st_nlink) != (0o640, 0, 1):
            return "the neighbour file was changed"
    size = count = 0
    seen: set[int] = set()
    for folder, folders, files in os.walk("/root", followlinks=False):
        if folder.count("/") - 1 > LIMITS.max_depth + 1:
            return "folders are nested too deeply"
        for name in (*folders, *files):
            path = f"{folder}/{name}"
            status = os.lstat(path)
            count += 1
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) or stat.S_ISSOCK(status.st_mode):
                return "a device node was made"
            if status.st_ino not in seen and stat.S_ISREG(status.st_mode):
                seen.add(status.st_ino)
                size += status.st_size
            odd = {item for item in os.listxattr(path, follow_symlinks=False) if not item.startswith("user.")} - _XATTRS
            odd |= {item for item in os.listxattr(path, follow_symlinks=False) if item.startswith("user.overlay.")}
            if odd:
                return f"the attribute {min(odd)} was set"
            if name.startswith(".wh."):
                return "a whiteout became a file"
    if size > LIMITS.max_bytes or count > LIMITS.max_entries:
        return f"{size} bytes in {count} files were made"
    return ""


def plant(fault: str) -> Limits:
    """Break one defence; returns the limits that the broken code goes by."""
    if fault == "no root folder":
        confine.enter_root = lambda folder: os.chdir(folder)  # noqa: PLW0108
    elif fault == "attributes":
        unpack._is_allowed_xattr = lambda *_: True
    elif fault == "devices":
        tarfile.TarInfo.ischr = lambda self: False  # type: ignore[method-assign]
        make = unpack.Unpacker._make

        def make_devices(self: unpack.Unpacker, entry: tarfile.TarInfo, name: str, entries: layers.Entries) -> None:
            if entry.type == tarfile.CHRTYPE:
                os.mknod(name, stat.S_IFCHR | 0o600, os.makedev(1, 3))
            else:
                make(self, entry, name, entries)

        unpack.Unpacker._make = make_devices  # type: ignore[method-assign]
    elif fault == "whiteouts":
        unpack._WHITEOUT = "\0"
    elif fault == "endless":
        layers._MAX_READS_AT_END = 1 << 62
    elif fault == "depth":
        return replace(LIMITS, max_depth=1 << 30)
    elif fault == "bytes":
        return replace(LIMITS, max_bytes=1 << 60, max_file_bytes=1 << 60)
    elif fault:
        raise SystemExit(f"no fault is called {fault}")
    return LIMITS


if __name__ == "__main__":
    main()
