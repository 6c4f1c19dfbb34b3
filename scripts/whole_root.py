"""Run a command so that its root folder is the root of its mount namespace: `whole_root.py COMMAND ARGUMENT...`.

In a plain chroot it is not, and then container engines are dangerous: what they start by joining a container's mount
namespace, as `exec` does, begins at the root of that namespace, which is the machine's root and not the container's.
Outside of a chroot this only becomes the command. Inside, it makes a mount namespace in which the chroot's tree is all
there is, by pivot_root(2), and then becomes the command.
"""

from __future__ import annotations

import ctypes
import os
import sys

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 1 << 18
_MNT_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Become the command."""
    command = sys.argv[1:]
    if not command:
        sys.exit("usage: whole_root.py COMMAND ARGUMENT...")
    if os.geteuid() == 0 and is_chrooted():
        make_root_whole()
    os.execvp(command[0], command)


def is_chrooted() -> bool:
    """Whether the root folder is another one than that of the mount namespace; found out by a child that goes there."""
    child = os.fork()
    if child == 0:
        try:
            before = os.stat("/")
            _go_to_namespace_root()
            after = os.stat("/")
            os._exit((before.st_dev, before.st_ino) != (after.st_dev, after.st_ino))
        except OSError:
            os._exit(0)
    _pid, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 1


def make_root_whole() -> None:
    """Leave the chroot for a mount namespace whose root it is. The working directory stays what it was."""
    folder = os.getcwd()
    os.fchdir(_go_to_namespace_root())
    tree = os.getcwd().encode()
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", tree, tree, None, _MS_BIND | _MS_REC, None)
    os.chdir(tree)
    _call("syscall", _SYS_PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chroot(".")
    os.chdir(folder)


def _go_to_namespace_root() -> int:
    """Enter a copy of the mount namespace; joining it, unlike making it, sets the root to the namespace's own.

    Returns a descriptor of what was the root folder before, within the copy.
    """
    _call("unshare", _CLONE_NEWNS)
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    _call("setns", namespace, _CLONE_NEWNS)
    os.close(namespace)
    return root


def _call(name: str, *arguments: object) -> None:
    if getattr(_LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
