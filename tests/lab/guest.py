"""The guest that tests boot: built from Debian's kernel as an operator would build it, and kept for the next session."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from dispatcher_hyper_vm.guest.build import MANIFEST, build_agent, kernel_of_package, make_guest, place_guest
from dispatcher_hyper_vm.guest.debian import fetch_kernel
from dispatcher_hyper_vm.guest.exec import BuildFailed
from tests.lab.child import PartMissingError

KERNEL = "linux-image-amd64"
_ROOT = Path(__file__).parents[2]


def ensure_guest() -> Path:
    """The folder of guests, with "default" in it. The kernel's package is kept; the guest follows the agent's sources.

    Raises:
        PartMissingError: it cannot be built here.
    """
    cache = Path(os.environ.get("DISPATCHER_LAB_GUESTS", _ROOT / ".lab" / "guests"))
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            package = fetch_kernel(KERNEL, cache)
            agent = build_agent()
            target = cache / f"{package.sha256[:12]}-{_digest(agent)}"
            if not (target / "default" / MANIFEST).exists():
                with tempfile.TemporaryDirectory(dir=cache) as work:
                    place_guest(make_guest(kernel_of_package(package), agent), Path(work) / "default")
                    target.mkdir(exist_ok=True)
                    (Path(work) / "default").rename(target / "default")
        except BuildFailed as error:
            raise PartMissingError(f"no guest can be built: {error.message}") from error
    return target


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
