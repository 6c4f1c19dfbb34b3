"""The plugin's section of dispatcher.yaml. An unknown key or a bad value is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dispatcher_hyper_vm.guest.registry import DEFAULT_FOLDER

_Seconds = Annotated[float, Field(gt=0, le=3600)]
_RLIMITS = frozenset(
    (
        *("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice"),
        *("nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
    )
)
MIB = 1 << 20


class Config(BaseModel):
    """Settings of pods in virtual machines; every one has a default that fits Debian.

    `host_folders` says what becomes of mounts of the node's own folders: "9p" shows them to the guest, "refuse"
    refuses such containers. `templates` says who may be cloned from one booted guest. Sizes are those that a container sees; images on the node are sparse.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    driver: Literal["qemu"] = "qemu"
    qemu: Annotated[str, Field(pattern=r"^[A-Za-z0-9/_.+-]{1,255}$")] = "qemu-system-x86_64"
    guests_dir: Annotated[str, Field(pattern=r"^/[^\x00]*$")] = DEFAULT_FOLDER
    kernel: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] = "default"
    templates: Literal["node", "namespace", "off"] = "node"
    host_folders: Literal["9p", "refuse"] = "9p"
    layer_mib: Annotated[int, Field(ge=16, le=16 << 20)] = 10240
    empty_dir_mib: Annotated[int, Field(ge=16, le=16 << 20)] = 10240
    shm_bytes: Annotated[int, Field(ge=4096)] = 64 * MIB
    rlimits: Mapping[str, tuple[int, int]] = {"nofile": (1024, 1048576)}
    agent_deadline_s: _Seconds = 30.0
    power_off_s: _Seconds = 5.0
    drain_s: _Seconds = 5.0
    kill_s: _Seconds = 15.0
    sync_s: _Seconds = 1.0

    @field_validator("rlimits")
    @classmethod
    def _known_rlimits(cls, value: Mapping[str, tuple[int, int]]) -> Mapping[str, tuple[int, int]]:
        unknown = sorted(set(value) - _RLIMITS)
        if unknown:
            raise ValueError(f"unknown limit {unknown[0]!r}; known are {', '.join(sorted(_RLIMITS))}")
        if any(soft < 0 or hard < soft for soft, hard in value.values()):
            raise ValueError("a limit is (soft, hard) with 0 <= soft <= hard")
        return value


def parse(section: Mapping[str, Any]) -> Config:
    """Check a section. Raises ValueError (pydantic's ValidationError) naming the key."""
    return Config.model_validate(dict(section))
