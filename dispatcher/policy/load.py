"""From the text of a policy file to a `Policy`, or to all that is wrong with it, each at its line and column. Pure.

Four gates: YAML, shape, meaning, and the file's own test cases. A later gate is tried only when the earlier ones let
the file through; within a gate everything is reported at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dispatcher.model import Isolation
from dispatcher.policy import selftest
from dispatcher.policy.decision import CompiledRule, Destination, Floor, Policy, RuntimeTraits
from dispatcher.policy.facts import normal_image
from dispatcher.policy.matching import compile_match, glob
from dispatcher.policy.schema import CONTAINER_MATCHERS, Match, PolicyFile, Rule, Target
from dispatcher.policy.shadows import covers, is_contradiction
from dispatcher.yaml_marks import Document, Problem, YamlError, did_you_mean, load, validate

Path = tuple[str | int, ...]

# An image's full name begins with a registry: a word with a dot or port, or a glob that can stand for one.
_IMAGE_HOST = re.compile(r"\*|[^/]*[.:*?][^/]*/|localhost/")
_RESERVED = ("default", "floor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A policy that passed all gates, and what an operator should know of it nevertheless."""

    policy: Policy
    file: PolicyFile
    warnings: tuple[Problem, ...] = ()


def load_policy(
    text: str | bytes,
    file: str,
    runtimes: Mapping[str, RuntimeTraits],
    *,
    plugins: Collection[str] | None = None,
) -> Loaded:
    """Load a policy file.

    Args:
        text: its contents.
        file: its name, for messages only.
        runtimes: what is loaded here, and what was known earlier (`is_loaded` false).
        plugins: names of the plugins with routing hooks, or None to leave `hooks.may_override` unchecked.

    Raises:
        YamlError: with every problem that was found.
    """
    document = load(text, file)
    parsed = validate(document, PolicyFile)
    known = _known_runtimes(parsed, runtimes)
    problems = list(_check(document, parsed, runtimes, known))
    if problems:
        raise YamlError(problems)

    policy = replace(_compile(parsed, known), hash=hash_of(text))
    failed = [
        document.problem(("tests", index), f'test "{case.name}": {failure}')
        for index, case in enumerate(parsed.tests)
        if (failure := selftest.run(policy, case))
    ]
    if failed:
        raise YamlError(failed)
    warnings = tuple(_warn(document, parsed, policy, plugins))
    return Loaded(policy=policy, file=parsed, warnings=warnings)


def hash_of(text: str | bytes) -> str:
    """Return the name of a policy's contents, as shown in records and logs."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def _known_runtimes(parsed: PolicyFile, runtimes: Mapping[str, RuntimeTraits]) -> dict[str, RuntimeTraits]:
    """What is loaded, and what the file declares to exist elsewhere or later."""
    declared = {
        name: RuntimeTraits(isolation=level, option_keys=None, is_loaded=False)
        for name, level in parsed.runtimes.items()
    }
    return {**declared, **runtimes}


# ------------------------------------------------------------------------------------------------------------- compile
def _compile(parsed: PolicyFile, known: Mapping[str, RuntimeTraits]) -> Policy:
    sandbox = [rule for rule in parsed.rules if rule.phase == "sandbox"]
    return Policy(
        runtimes=known,
        default=parsed.default.refuse
        or Destination(runtime=parsed.default.runtime or "", options=parsed.default.with_),
        handlers={
            name: Destination(runtime=target.runtime, options=target.with_, trusted_only=target.trusted_only)
            for name, target in parsed.handlers.items()
        },
        floors=tuple(
            Floor(pattern=pattern, covers=glob(pattern), level=level) for pattern, level in parsed.floors.items()
        ),
        trusted=tuple(glob(pattern) for pattern in parsed.trusted),
        may_override=frozenset(parsed.hooks.may_override),
        refusals=tuple(_rule(rule) for rule in sandbox if rule.runtime is None),
        rules=tuple(_rule(rule) for rule in sandbox if rule.runtime is not None),
        container_rules=tuple(_rule(rule) for rule in parsed.rules if rule.phase == "container"),
    )


def _rule(rule: Rule) -> CompiledRule:
    destination = None
    if rule.runtime is not None:
        destination = Destination(runtime=rule.runtime, options=rule.with_, trusted_only=rule.trusted_only)
    return CompiledRule(
        name=rule.name,
        match=compile_match(rule.match, of_container=rule.phase == "container"),
        destination=destination,
        refusal=rule.refuse or "",
    )


# -------------------------------------------------------------------------------------------------------------- checks
def _check(
    document: Document,
    parsed: PolicyFile,
    runtimes: Mapping[str, RuntimeTraits],
    known: Mapping[str, RuntimeTraits],
) -> Iterator[Problem]:
    yield from _check_names(document, parsed)
    for name, level in parsed.runtimes.items():
        traits = runtimes.get(name)
        if traits is not None and traits.isolation is not level:
            message = f'the runtime "{name}" gives {traits.isolation.label}, not {level.label}'
            yield document.problem(("runtimes", name), message)
    for path, target in _targets(parsed):
        yield from _check_target(document, path, target, known)
    for index, rule in enumerate(parsed.rules):
        yield from _check_rule(document, ("rules", index), rule)
    yield from _check_order(document, parsed, known)


def _targets(parsed: PolicyFile) -> Iterator[tuple[Path, Target]]:
    """Everything that names a runtime, with its place. `with` has its own place below it."""
    for name, handler in parsed.handlers.items():
        yield ("handlers", name), handler
    for index, rule in enumerate(parsed.rules):
        if rule.runtime is not None:
            yield ("rules", index), Target.model_construct(runtime=rule.runtime, with_=rule.with_)
    if parsed.default.runtime is not None:
        yield ("default",), Target.model_construct(runtime=parsed.default.runtime, with_=parsed.default.with_)


def _check_names(document: Document, parsed: PolicyFile) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, rule in enumerate(parsed.rules):
        path: Path = ("rules", index, "name")
        if rule.name in _RESERVED:
            yield document.problem(path, f'"{rule.name}" is what decisions without a rule are called')
        if rule.name in seen:
            line = document.mark(("rules", seen[rule.name], "name")).line
            yield document.problem(path, f'a rule "{rule.name}" stands already in line {line}')
        seen.setdefault(rule.name, index)
    cases: dict[str, int] = {}
    for index, case in enumerate(parsed.tests):
        if case.name in cases:
            line = document.mark(("tests", cases[case.name], "name")).line
            yield document.problem(("tests", index, "name"), f"a test of this name stands already in line {line}")
        cases.setdefault(case.name, index)
        expected = case.expect.rule
        known = {rule.name for rule in parsed.rules} | set(_RESERVED)
        if expected is not None and expected not in known and ":" not in expected:
            message = f'there is no rule "{expected}".{did_you_mean(expected, known)}'
            yield document.problem(("tests", index, "expect", "rule"), message)


def _check_target(
    document: Document, path: Path, target: Target, known: Mapping[str, RuntimeTraits]
) -> Iterator[Problem]:
    traits = known.get(target.runtime)
    if traits is None:
        where = path if (*path, "runtime") not in document.marks else (*path, "runtime")
        names = ", ".join(sorted(known)) or "none"
        yield document.problem(
            where,
            f'no runtime "{target.runtime}" is loaded or declared in runtimes; known: {names}.'
            f"{did_you_mean(target.runtime, known)}",
        )
        return
    if traits.option_keys is None:
        return
    for key in target.with_:
        if key not in traits.option_keys:
            allowed = ", ".join(sorted(traits.option_keys)) or "none"
            yield document.problem(
                (*path, "with", key),
                f'the runtime "{target.runtime}" has no option "{key}"; it has: {allowed}.'
                f"{did_you_mean(key, traits.option_keys)}",
                key=True,
            )


def _check_rule(document: Document, path: Path, rule: Rule) -> Iterator[Problem]:
    if rule.phase == "container" and rule.runtime is not None:
        yield document.problem(
            (*path, "runtime"),
            "the runtime is chosen before containers are known: a rule of phase container can only refuse",
            key=True,
        )
    is_listed = isinstance(_data_at(document, (*path, "match")), list)
    for index, match in enumerate(rule.match or ()):
        where = (*path, "match", index) if is_listed else (*path, "match")
        yield from _check_match(document, where, match, rule)
        if is_contradiction(match):
            yield document.problem(where, "this can never match: its not covers all of the rest")


def _check_match(document: Document, path: Path, match: Match, rule: Rule) -> Iterator[Problem]:
    if rule.phase == "sandbox":
        for name in sorted(match.model_fields_set & CONTAINER_MATCHERS):
            yield document.problem(
                (*path, name),
                f"{name} is known only when a container is created: this needs a rule with phase: container and refuse",
                key=True,
            )
        if match.handler is not None and rule.runtime is not None:
            yield document.problem(
                (*path, "handler"),
                "a pod with a handler is decided by the handlers map, so a rule that names a runtime never sees one",
                key=True,
            )
    if match.image is not None:
        for pattern in (*match.image.any_of, *match.image.other_than):
            if not _IMAGE_HOST.match(pattern):
                yield document.problem(
                    (*path, "image"),
                    f'"{pattern}" matches no image: write them in full, such as "{normal_image(pattern)}"',
                )
    is_listed = isinstance(_data_at(document, (*path, "not")), list)
    for index, inner in enumerate(match.not_ or ()):
        yield from _check_match(document, (*path, "not", index) if is_listed else (*path, "not"), inner, rule)


def _data_at(document: Document, path: Path) -> object:
    data = document.data
    for part in path:
        if not isinstance(data, dict | list) or (isinstance(data, dict) and part not in data):
            return None
        data = data[part]  # type: ignore[index]
    return data


def _check_order(document: Document, parsed: PolicyFile, known: Mapping[str, RuntimeTraits]) -> Iterator[Problem]:
    """Find rules behind ones that take everything from them. Refusals are asked before all routes."""
    order = sorted(
        (index for index, rule in enumerate(parsed.rules)),
        key=lambda index: (parsed.rules[index].phase, parsed.rules[index].runtime is not None, index),
    )
    strongest = _strongest(parsed, known)
    for place, index in enumerate(order):
        rule = parsed.rules[index]
        for earlier in (parsed.rules[other] for other in order[:place]):
            if (
                earlier.phase == rule.phase
                and _takes_all(earlier, strongest, known)
                and covers(earlier.match, rule.match)
            ):
                yield document.problem(
                    ("rules", index),
                    f'the rule "{rule.name}" is never reached: "{earlier.name}" matches all that it matches, and '
                    f"{'refusals are asked first' if earlier.runtime is None and rule.runtime is not None else 'stands before it'}",
                )
                break


def _strongest(parsed: PolicyFile, known: Mapping[str, RuntimeTraits]) -> Isolation:
    names = [target.runtime for path, target in _targets(parsed) if path[0] != "handlers"]
    return max((known[name].isolation for name in names if name in known), default=Isolation.VM)


def _takes_all(rule: Rule, strongest: Isolation, known: Mapping[str, RuntimeTraits]) -> bool:
    """False for rules that may be passed over, so that later ones get their turn."""
    if rule.runtime is None:
        return True
    if rule.trusted_only:
        return False
    asks_users = any(_asks_users(match) for match in rule.match or ())
    traits = known.get(rule.runtime)
    return not asks_users or (traits is not None and traits.isolation >= strongest)


def _asks_users(match: Match) -> bool:
    return bool(match.labels or match.annotations) or any(_asks_users(inner) for inner in match.not_ or ())


# ------------------------------------------------------------------------------------------------------------ warnings
def _warn(document: Document, parsed: PolicyFile, policy: Policy, plugins: Collection[str] | None) -> Iterable[Problem]:
    for path, target in _targets(parsed):
        if not policy.runtimes[target.runtime].is_loaded:
            yield document.problem(
                path,
                f'the runtime "{target.runtime}" is not loaded here: pods that this leads to will be refused'
                + (" (a node with Docker only uses policy-docker.yaml)" if path == ("default",) else ""),
            )
    for index, rule in enumerate(parsed.rules):
        if rule.runtime is None:
            continue
        level = policy.isolation_of(rule.runtime)
        everywhere = next((floor for floor in policy.floors if floor.pattern == "*"), None)
        if everywhere is not None and level < everywhere.level:
            yield document.problem(
                ("rules", index), f'this leads below the floor "*" ({everywhere.level.label}), so it can only refuse'
            )
        shared = [m for m in rule.match or () if m.host_network or m.host_pid or m.host_ipc]
        if level is Isolation.VM and shared:
            yield document.problem(
                ("rules", index), f"host namespaces cannot be had in {rule.runtime}, so such pods are refused"
            )
    if "*" in parsed.trusted:
        yield document.problem(("trusted",), "every namespace is trusted: any user may lower a pod's isolation")
    for index, name in enumerate(parsed.hooks.may_override):
        if plugins is not None and name not in plugins:
            hint = did_you_mean(name, plugins)
            yield document.problem(("hooks", "may_override", index), f'no plugin "{name}" with hooks is loaded.{hint}')
