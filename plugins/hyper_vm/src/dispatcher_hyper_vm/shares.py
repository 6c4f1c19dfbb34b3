"""Host folders in a machine: binds below the pod's share, the one folder that its 9p export shows.

The share is a file system of its own with shared propagation (`dispatcher_vm_kit.share`), so what is bound below it
arrives in the monitor's mount namespace, and goes with it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import InvalidRequest, RuntimeDown

_LIBC = ctypes.CDLL(None, use_errno=True)
_BIND, _REC = 0x1000, 0x4000
_PRIVATE, _SLAVE = 1 << 18, 1 << 19


def _mount(source: str | None, target: str, flags: int) -> None:
    words = (None if source is None else os.fsencode(source), os.fsencode(target))
    if _LIBC.mount(*words, None, ctypes.c_ulong(flags), None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount: {os.strerror(code)}")


@effect("vm.bind_share")
def bind_share(folder: Path, name: str, source: str, *, follows: bool) -> None:
    """Show `source` (a real path of the host) as `name` in the share. Idempotent.

    With `follows`, what the host mounts below the source later is seen, too.

    Raises:
        InvalidRequest: the source is gone.
        RuntimeDown: it cannot be bound.
    """
    target = folder / name
    try:
        if os.path.isdir(source):
            target.mkdir(mode=0o755, exist_ok=True)
        else:
            target.touch(mode=0o644, exist_ok=True)
        if _is_bound(target):
            return
        _mount(source, str(target), _BIND | _REC)
        _mount(None, str(target), (_SLAVE if follows else _PRIVATE) | _REC)
    except FileNotFoundError as error:
        raise InvalidRequest(f"host path {source!r} does not exist any more") from error
    except OSError as error:
        raise RuntimeDown(f"host path {source!r} cannot be shown to a machine: {error.strerror}") from error


def _is_bound(target: Path) -> bool:
    """True where something is mounted exactly here; ismount does not see binds of the same file system."""
    path = str(target.resolve())
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as rows:
        return any(row.split()[4] == path for row in rows)
