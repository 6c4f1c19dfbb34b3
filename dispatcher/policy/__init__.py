"""Routing: which runtime a pod goes to, by a file that operators edit. See docs/policy.md.

`PolicyEngine` is what a daemon uses; `load_policy` and `explain` do the same offline, for checks and commands.
"""

from dispatcher.policy.decision import Policy, RuleTrace, RuntimeTraits, Verdict
from dispatcher.policy.engine import Explanation, Observer, PolicyEngine, PolicyStatus, Settings, explain
from dispatcher.policy.facts import facts_of_pod
from dispatcher.policy.load import Loaded, load_policy
from dispatcher.policy.schema import json_schema

__all__ = [
    "Explanation",
    "Loaded",
    "Observer",
    "Policy",
    "PolicyEngine",
    "PolicyStatus",
    "RuleTrace",
    "RuntimeTraits",
    "Settings",
    "Verdict",
    "explain",
    "facts_of_pod",
    "json_schema",
    "load_policy",
]
