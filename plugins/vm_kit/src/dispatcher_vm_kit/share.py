"""The folder of a pod that its guest may mount: a tiny file system of its own, into which the host binds what it shares.

The guest cannot fill the host's disk through it, since the monitor sees its top read-only; what is bound below keeps
its own rules. It is a shared mount, so that binds made after the monitor's start appear in the monitor's namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import RuntimeDown

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_SHARED = 2, 4, 8, 1 << 20
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8


@effect("vm.make_share")
def make_share(folder: Path) -> None:
    """Make the folder and mount its small file system on it. Idempotent.

    Raises:
        RuntimeDown: the kernel refuses the mount.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    if is_share(folder):
        return
    try:
        _mount(b"cri-share", folder, b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, b"mode=0755,size=1m,nr_inodes=4k")
        _mount(None, folder, None, _MS_SHARED, None)
    except OSError as error:
        remove_share(folder)
        raise RuntimeDown(f"the shared folder {folder} cannot be mounted") from error


def is_share(folder: Path) -> bool:
    """Whether a file system is mounted on the folder itself."""
    try:
        return folder.stat().st_dev != folder.parent.stat().st_dev
    except FileNotFoundError:
        return False


@effect("vm.remove_share")
def remove_share(folder: Path) -> None:
    """Unmount the folder with all that is bound below it, and remove it. Idempotent; nothing shared is touched."""
    while True:
        if _LIBC.umount2(os.fsencode(folder), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            code = ctypes.get_errno()
            if code in {errno.EINVAL, errno.ENOENT}:  # not a mount (any more), no folder
                break
            raise OSError(code, f"umount of {folder}: {os.strerror(code)}")
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()


def _mount(source: bytes | None, target: Path, kind: bytes | None, flags: int, options: bytes | None) -> None:
    if _LIBC.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), options) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount on {target}: {os.strerror(code)}")
