"""Finding paths inside an unpacked image: links are the image's, so the kernel resolves them with the image as root."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from pathlib import Path

from dispatcher.errors import InvalidRequest

_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_LIBC = ctypes.CDLL(None, use_errno=True)


def resolve_in_root(root: Path, sub_path: str) -> Path:
    """Return the real path of `sub_path` inside the tree `root`, whatever links the image holds.

    The result is safe to hand to an engine as long as nobody writes to the tree, which is the store's promise.

    Raises:
        InvalidRequest: it does not exist in the image, or is absolute or has parent references.
    """
    if sub_path.startswith("/") or ".." in Path(sub_path).parts or "\0" in sub_path:
        raise InvalidRequest(f"The image sub path {sub_path[:200]!r} must be relative and without '..'.")
    real_root = root.resolve(strict=True)
    root_fd = os.open(real_root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = _openat2(root_fd, sub_path or ".", os.O_PATH | os.O_CLOEXEC)
        try:
            found = Path(os.readlink(f"/proc/self/fd/{fd}"))
        finally:
            os.close(fd)
    except OSError as error:
        raise InvalidRequest(f"The image has no {sub_path[:200]!r}.") from error
    finally:
        os.close(root_fd)
    if found != real_root and real_root not in found.parents:
        raise InvalidRequest(f"The image sub path {sub_path[:200]!r} leads out of the image.")
    return found


def read_in_root(root: Path, path: str, limit: int) -> bytes:
    """Read a small file of the tree `root`, links resolved with the image as root; b"" where there is none.

    Raises:
        InvalidRequest: it is no regular file, or larger than `limit`.
    """
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Not blocking: an image may put a fifo there.
        fd = _openat2(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return b""
        raise InvalidRequest(f"The image's /{path} cannot be read.") from error
    finally:
        os.close(root_fd)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise InvalidRequest(f"The image's /{path} is no regular file of at most {limit} bytes.")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(fd)


def _openat2(folder: int, path: str, flags: int) -> int:
    how = struct.pack("=QQQ", flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    fd = int(_LIBC.syscall(_SYS_OPENAT2, folder, os.fsencode(path), ctypes.c_char_p(how), len(how)))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd
