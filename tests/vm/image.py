"""The disk image of a Debian 12 node: built from Debian's and Python's registries once, cached by what goes into it.

Two stages, since the first takes minutes and rarely changes: Debian as a tar archive, by the list of packages; and the
disk with our pinned Python packages, kernel and initramfs, by the archive and our requirements. Everything is made in
a temporary folder, renamed when it is whole, and removed after a failure. Foreign mounts exist only in a namespace of
the building process, so even SIGKILL leaves none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parents[2]
GUEST: Final = Path(__file__).with_name("guest")
CACHE: Final = Path(os.environ.get("DISPATCHER_VM_CACHE") or PROJECT / ".lab/vm")

SUITE: Final = "bookworm"
# The cloud flavour of Debian's kernel: the same source and configuration without drivers for real hardware.
SYSTEM_PACKAGES: Final = (
    *("systemd", "systemd-sysv", "dbus", "udev", "kmod", "linux-image-cloud-amd64", "zstd", "apparmor", "runc"),
    *("python3", "python3-venv", "make", "git", "ca-certificates", "netbase", "e2fsprogs", "util-linux", "psmisc"),
)
# The guest runs no machine of its own.
HOST_ONLY: Final = frozenset({"qemu-system-x86"})
# Started by a test that wants them, never by the boot.
IDLE_UNITS: Final = (
    *("docker.service", "docker.socket", "containerd.service", "docker-registry.service", "nginx.service"),
    *("nftables.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("e2scrub_reap.service", "fstrim.timer", "getty@tty1.service", "systemd-networkd.service"),
)
DISK_BYTES: Final = 12 << 30
# Where the repository is in the guest: the packages of ours are installed from there, editable.
GUEST_REPOSITORY: Final = "/vm/repo"
GUEST_VENV: Final = "/opt/venv"
GUEST_WHEELS: Final = "/opt/wheels"
_KEPT: Final = 2


class BuildError(Exception):
    """A step of the build failed; the message has the end of its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A finished image: a raw ext4 disk, and what boots it."""

    disk: Path
    kernel: Path
    initrd: Path


def build() -> Image:
    """Return the image for this tree, building what is missing. Idempotent; two builders at once only waste time."""
    archive = CACHE / f"debian-{_digest(_debian_inputs())}.tar"
    place = CACHE / f"image-{_digest([archive.name.encode(), *_image_inputs()])}"
    image = Image(disk=place / "disk", kernel=place / "kernel", initrd=place / "initrd")
    if place.is_dir():
        return image
    CACHE.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        say(f"Debian {SUITE}: downloading and installing its packages (some minutes, once)")
        with _temporary() as folder:
            _make_debian(folder / "debian.tar")
            (folder / "debian.tar").rename(archive)
        _keep_newest("debian-*.tar")
    say("image: installing the pinned Python packages")
    with _temporary() as folder:
        made = folder / "image"
        made.mkdir()
        _make_image(archive, folder, made)
        made.rename(place)
    _keep_newest("image-*")
    say(f"image: {place.name} is ready")
    return image


def clean() -> None:
    """Remove everything that builds have cached."""
    shutil.rmtree(CACHE, ignore_errors=True)


def say(text: str) -> None:
    """Tell the person who waits."""
    print(f"vm: {text}", flush=True)


def guest_packages() -> list[str]:
    """Debian's packages in the guest: a bootable system, and what scripts/host.sh names for the tests."""
    listed = subprocess.run(
        [PROJECT / "scripts/host.sh", "packages", "test"], check=True, capture_output=True, text=True
    ).stdout.split()
    return [*SYSTEM_PACKAGES, *(name for name in listed if name not in HOST_ONLY)]


# ------------------------------------------------------------------------------------------------------------- digests
def _debian_inputs() -> Iterator[bytes]:
    yield f"1 {SUITE} {_mirror()} {' '.join(guest_packages())}".encode()


def _image_inputs() -> Iterator[bytes]:
    yield f"1 {DISK_BYTES} {' '.join(IDLE_UNITS)}".encode()
    yield Path(__file__).read_bytes()
    for path in (GUEST / "vm-job", GUEST / "vm-job.service", PROJECT / "requirements/dev.lock", *_project_files()):
        yield path.name.encode()
        yield path.read_bytes()


def _project_files() -> list[Path]:
    return [PROJECT / "pyproject.toml", *sorted(PROJECT.glob("plugins/*/pyproject.toml"))]


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]


def _mirror() -> str:
    """The mirror to use; empty for Debian's own."""
    return os.environ.get("DISPATCHER_VM_MIRROR", "")


# -------------------------------------------------------------------------------------------------------------- stages
def _make_debian(archive: Path) -> None:
    mirror = [_mirror()] if _mirror() else []
    _run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={','.join(guest_packages())}",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            SUITE,
            str(archive),
            *mirror,
        ]
    )


def _make_image(archive: Path, folder: Path, made: Path) -> None:
    root = folder / "root"
    root.mkdir()
    _run(["tar", "-C", str(root), "--numeric-owner", "--exclude=./dev/*", "-xf", str(archive)])
    _install_guest_files(root)
    _install_python_packages(folder, root)
    for name, source in (("kernel", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        shutil.copyfile(next((root / "boot").glob(source)), made / name)
    with (made / "disk").open("wb") as disk:
        disk.truncate(DISK_BYTES)
    # Written at once by mke2fs: no loop device, no mount.
    _run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-E", "root_owner=0:0", "-d", str(root), str(made / "disk")]
    )


def _install_guest_files(root: Path) -> None:
    (root / "etc/hostname").write_text("node\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n10.0.2.15 node\n")
    (root / "etc/fstab").write_text("LABEL=root / ext4 rw,noatime 0 1\n")
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").write_text("")
    (root / "vm").mkdir()
    shutil.copyfile(GUEST / "vm-job.service", root / "etc/systemd/system/vm-job.service")
    shutil.copyfile(GUEST / "vm-job", root / "usr/local/sbin/vm-job")
    (root / "usr/local/sbin/vm-job").chmod(0o755)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "vm-job.service").symlink_to("/etc/systemd/system/vm-job.service")
    for unit in IDLE_UNITS:
        for link in (root / "etc/systemd/system").glob(f"*.wants/{unit}"):
            link.unlink()


def _install_python_packages(folder: Path, root: Path) -> None:
    """The pinned packages as on any machine, from files, so that the chroot needs no network; ours are editable."""
    wheels = root / GUEST_WHEELS.lstrip("/")
    lock = PROJECT / "requirements/dev.lock"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    target = ["--python-version", "3.11", "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
    _run([*pip, "download", "--require-hashes", *target, "-r", str(lock), "-d", str(wheels)])

    repository = root / GUEST_REPOSITORY.lstrip("/")
    copy_repository(repository)
    plugins = [f"{GUEST_REPOSITORY}/plugins/{path.parent.name}" for path in _project_files()[1:]]
    editable = " ".join(f"-e {path}" for path in (GUEST_REPOSITORY, *plugins))
    script = (
        "set -eu; mount -t proc proc /proc; mount -t tmpfs dev /dev; mknod -m 666 /dev/null c 1 3; "
        "mknod -m 666 /dev/urandom c 1 9; "
        f"python3 -m venv {GUEST_VENV}; pip='{GUEST_VENV}/bin/python -m pip -q --disable-pip-version-check'; "
        f"$pip install --no-index --find-links {GUEST_WHEELS} --require-hashes "
        f"-r {GUEST_REPOSITORY}/requirements/dev.lock; "
        f"$pip install --no-index --no-deps --no-build-isolation {editable}"
    )
    chroot = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "chroot", str(root), "sh", "-c", script]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
    _run(chroot, env=environment)
    shutil.rmtree(repository)


def copy_repository(target: Path) -> None:
    """Copy the files that git knows, as they are in the work tree, also those that are not committed yet."""
    listed = subprocess.run(
        ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
    ).stdout.split(b"\0")
    for name in listed:
        source = PROJECT / os.fsdecode(name)
        if not name or not source.is_file():
            continue
        copy = target / os.fsdecode(name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)


# --------------------------------------------------------------------------------------------------------------- parts
@contextmanager
def _temporary() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="making-", dir=CACHE))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep_newest(pattern: str) -> None:
    """Forget old builds. A machine that runs from one keeps its open file."""
    for path in sorted(CACHE.glob(pattern), key=lambda found: found.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _run(argv: Sequence[str], *, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise BuildError(f"{argv[0]} failed with {done.returncode}:\n{tail}")
