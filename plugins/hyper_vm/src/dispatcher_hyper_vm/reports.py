"""The termination message on the host: the file that the kubelet made and reads after the exit."""

from __future__ import annotations

import os
import stat

from dispatcher.api import effect


@effect("vm.write_report")
def write_report(path: str, data: bytes) -> None:
    """Replace the content of the kubelet's file, which must exist. Idempotent.

    Raises:
        OSError: it is gone, is a link, or is no regular file.
    """
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is no regular file")
        os.ftruncate(fd, 0)
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], written)
    finally:
        os.close(fd)
