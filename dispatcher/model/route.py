"""The decision which runtime a pod goes to, kept in its record and never computed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Isolation(IntEnum):
    """How strongly a runtime separates a pod from the node, in rising order, so that a floor is a comparison."""

    SHARED_KERNEL = 1
    SANDBOXED = 2
    VM = 3

    @property
    def label(self) -> str:
        """The spelling used in policy files and output, such as "shared-kernel"."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What one routing hook said, and whether the policy file let it count."""

    plugin: str
    runtime: str
    reason: str
    counted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A decided route. `rule` names the rule (or "handler:NAME", "default"), `reason` is a sentence for people.

    `options` are the rule's `with:` values, validated at load; only a runtime that declares a key sees it.
    """

    runtime: str
    rule: str
    reason: str
    isolation: Isolation
    policy_hash: str = ""
    decision_id: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    votes: tuple[Vote, ...] = ()
