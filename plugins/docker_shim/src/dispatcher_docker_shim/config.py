"""The plugin's section of dispatcher.yaml. An unknown key or a bad value is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Config(BaseModel):
    """Settings of the Docker runtime; every one has a default that fits Debian's docker.io.

    `log_driver` is the engine's durable buffer between a container and our log file: "local" keeps every byte,
    "json-file" replaces what is not UTF-8 and cuts characters at 16 KiB. `rlimits` maps a name such as "nofile" to
    (soft, hard) for every container; values above what the engine itself may grant are lowered, with a note.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    socket: Annotated[str, Field(pattern=r"^/[^\x00]+$")] = "/var/run/docker.sock"
    repository: Annotated[str, Field(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$")] = "cri-dispatcher.local"
    oci_runtime: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*)?$")] = ""
    log_driver: Literal["local", "json-file"] = "local"
    compilers: tuple[_Name, ...] = ("gcc", "cc", "clang")
    threads: Annotated[int, Field(ge=2, le=64)] = 12
    call_deadline_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    load_deadline_s: Annotated[float, Field(gt=0, le=7200)] = 900.0
    ping_deadline_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    kill_deadline_s: Annotated[float, Field(gt=0, le=600)] = 15.0
    oom_settle_s: Annotated[float, Field(ge=0, le=10)] = 1.0
    shm_bytes: Annotated[int, Field(ge=4096)] = 64 * 1024 * 1024
    rlimits: Mapping[str, tuple[int, int]] = {}

    @field_validator("rlimits")
    @classmethod
    def _known_rlimits(cls, value: Mapping[str, tuple[int, int]]) -> Mapping[str, tuple[int, int]]:
        unknown = sorted(set(value) - RLIMITS)
        if unknown:
            raise ValueError(f"unknown limit {unknown[0]!r}; known are {', '.join(sorted(RLIMITS))}")
        if any(soft < 0 or hard < soft for soft, hard in value.values()):
            raise ValueError("a limit is (soft, hard) with 0 <= soft <= hard")
        return value


RLIMITS = frozenset(
    (
        *("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice"),
        *("nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
    ),
)


def parse(section: Mapping[str, Any]) -> Config:
    """Check a section. Raises ValueError (pydantic's ValidationError) naming the key."""
    return Config.model_validate(dict(section))
