"""What the engine at hand can do, read once per connection from its own answers. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OLDEST_API = (1, 41)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTraits:
    """Abilities and limits of an engine, as the builders need them.

    `oom_floor` is the lowest oom_score_adj that the engine may set, None where it may set any. `rlimit_caps` are
    the hard limits that it cannot raise. `cgroup_version` is 1 or 2.
    """

    version: str = ""
    api: tuple[int, int] = OLDEST_API
    root_dir: str = "/var/lib/docker"
    cgroup_driver: str = "cgroupfs"
    cgroup_version: int = 1
    live_restore: bool = False
    seccomp: bool = True
    apparmor: bool = False
    selinux: bool = False
    rootless: bool = False
    userns_remap: bool = False
    swap_limit: bool = True
    pids_limit: bool = True
    recursive_read_only: bool = False
    cdi: bool = False
    containerd_images: bool = False
    oom_floor: int | None = None
    rlimit_caps: Mapping[str, int] = field(default_factory=dict)


def from_engine(
    info: Mapping[str, Any],
    api: tuple[int, int],
    *,
    oci_runtime: str = "",
    oom_floor: int | None = None,
    rlimit_caps: Mapping[str, int] | None = None,
) -> EngineTraits:
    """Make the traits from the engine's /info answer and the negotiated API version."""
    options = {part.partition("=")[2] for item in info.get("SecurityOptions") or () for part in item.split(",")}
    runtime = (info.get("Runtimes") or {}).get(oci_runtime or info.get("DefaultRuntime") or "runc") or {}
    return EngineTraits(
        version=str(info.get("ServerVersion", "")),
        api=api,
        root_dir=str(info.get("DockerRootDir") or "/var/lib/docker"),
        cgroup_driver=str(info.get("CgroupDriver") or "cgroupfs"),
        cgroup_version=2 if str(info.get("CgroupVersion", "1")) == "2" else 1,
        live_restore=bool(info.get("LiveRestoreEnabled")),
        seccomp="seccomp" in options,
        apparmor="apparmor" in options,
        selinux="selinux" in options,
        rootless="rootless" in options,
        userns_remap="userns" in options,
        swap_limit=bool(info.get("SwapLimit", True)),
        pids_limit=bool(info.get("PidsLimit", True)),
        recursive_read_only=api >= (1, 44) and _advertises_rro(runtime),
        cdi=api >= (1, 44) and bool(info.get("CDISpecDirs")),
        containerd_images=any("io.containerd.snapshotter" in str(item) for item in info.get("DriverStatus") or ()),
        oom_floor=oom_floor,
        rlimit_caps=dict(rlimit_caps or {}),
    )


def _advertises_rro(runtime: Mapping[str, Any]) -> bool:
    text = (runtime.get("status") or {}).get("org.opencontainers.runtime-spec.features")
    if not text:
        return False
    try:
        return "rro" in (json.loads(text).get("mountOptions") or ())
    except (ValueError, AttributeError):
        return False
