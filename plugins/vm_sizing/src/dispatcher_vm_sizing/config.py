"""The section `plugins.vm_sizing` of dispatcher.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

MIB = 1 << 20


class Charge(StrEnum):
    """What to do with a pod whose own memory limit cannot hold its virtual machine."""

    OUTSIDE = "outside"
    SHRINK = "shrink"
    REFUSE = "refuse"


class SizingConfig(BaseModel):
    """The whole section. Memory is in MiB."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # For a pod that says nothing, and whose cgroup says nothing.
    default_vcpus: int = Field(default=1, ge=1, le=256)
    default_memory_mib: int = Field(default=64, ge=16)
    # Measured: what the guest's kernel and agent take of its memory, and what the VMM takes beside it.
    guest_overhead_mib: int = Field(default=72, ge=0)
    vmm_overhead_mib: int = Field(default=56, ge=0)
    # The smallest that holds a pod is taken: few different sizes mean few templates.
    memory_classes_mib: tuple[int, ...] = (
        *(128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288),
        *(16384, 24576, 32768, 49152, 65536, 131072, 262144),
    )
    vcpu_classes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    charge: Charge = Charge.OUTSIDE
    # The most that one virtual machine may charge to the node's reserve with charge: outside; null: no bound.
    node_reserve_mib: int | None = Field(default=None, ge=1)
    # With charge: shrink, pods that would be left with less are refused.
    min_shrunk_mib: int = Field(default=16, ge=1)
    cgroup_root: Path = Path("/sys/fs/cgroup")

    @field_validator("memory_classes_mib", "vcpu_classes")
    @classmethod
    def _rising(cls, classes: tuple[int, ...]) -> tuple[int, ...]:
        if not classes or classes[0] < 1 or list(classes) != sorted(set(classes)):
            raise ValueError("must be rising numbers, at least one")
        return classes

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> SizingConfig:
        """Check a section. Raises pydantic's ValidationError, which is a ValueError."""
        return cls.model_validate(dict(section))
