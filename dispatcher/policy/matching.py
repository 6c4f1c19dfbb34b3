"""Whether a pod or container meets the conditions of a rule, and if not, which condition fails first. Pure.

A `Match` of the file becomes a tuple of checks, each a named function of the facts; a rule holds one tuple per
alternative. The same checks decide and explain, so an explanation cannot differ from a decision.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from dispatcher.policy.facts import ContainerFacts, PodFacts
from dispatcher.policy.schema import Match, PatternSet, ValueSet

_SHOWN = 120  # characters of a value in an explanation; annotations may be 256 KiB long


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is matched: a pod, and in the container phase one of its containers."""

    pod: PodFacts
    container: ContainerFacts = field(default_factory=ContainerFacts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A condition that does not hold: its name and demand as in the file, and what the pod has instead."""

    matcher: str
    wanted: str
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One condition. `test` is asked for the truth, `show` for the words of an explanation."""

    matcher: str
    wanted: str
    test: Callable[[Subject], bool]
    show: Callable[[Subject], str]

    def failure(self, subject: Subject) -> Failure | None:
        """Return why the condition does not hold, or None if it does."""
        if self.test(subject):
            return None
        return Failure(matcher=self.matcher, wanted=self.wanted, found=shorten(self.show(subject)))


Clause = tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """One clause of these has to hold. No clause at all: everything matches."""

    clauses: tuple[Clause, ...] = ()

    def first_match(self, subject: Subject) -> Clause | None:
        """Return the first clause that holds."""
        if not self.clauses:
            return ()
        for clause in self.clauses:
            if all(check.test(subject) for check in clause):
                return clause
        return None

    def failures(self, subject: Subject) -> tuple[Failure, ...]:
        """Return the first failure of every clause, or nothing if one holds."""
        found = []
        for clause in self.clauses:
            failure = next(filter(None, (check.failure(subject) for check in clause)), None)
            if failure is None:
                return ()
            found.append(failure)
        return tuple(found)


def shorten(text: str) -> str:
    """Make untrusted text fit for one line of output."""
    shown = "".join(char if char.isprintable() else "?" for char in text[: _SHOWN + 1])
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."


# ------------------------------------------------------------------------------------------------------------ patterns
def glob(pattern: str) -> Callable[[str], bool]:
    """Compile a glob of `*` and `?`; all else is literal. Linear in the value, which an attacker may have written."""
    if "*" not in pattern and "?" not in pattern:
        return pattern.__eq__
    # translate() puts what stands between two stars into atomic groups, so no star is ever tried again.
    expression = re.compile(fnmatch.translate(pattern.replace("[", "[[]")))
    return lambda value: expression.match(value) is not None


def path_glob(pattern: str) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Compile a pattern of host paths into (is it inside, does it reach it).

    A path is inside a pattern that matches it or a folder above it. It reaches the pattern, too, when it is a folder
    above what the pattern names: whoever mounts / has mounted /etc.
    """
    pattern = pattern.rstrip("/") or "/"
    is_equal = glob(pattern)

    def is_inside(path: str) -> bool:
        return any(is_equal(part) for part in _ancestors(path))

    def does_reach(path: str) -> bool:
        return is_inside(path) or _can_begin(pattern, path.rstrip("/") + "/")

    return is_inside, does_reach


def _can_begin(pattern: str, text: str) -> bool:
    """True if something that the pattern matches begins with this text."""
    places = {0}
    for char in text:
        for place in sorted(places):  # a star may also stand for nothing
            step = place
            while step < len(pattern) and pattern[step] == "*":
                step += 1
                places.add(step)
        places = {
            place if pattern[place] == "*" else place + 1
            for place in places
            if place < len(pattern) and pattern[place] in ("*", "?", char)
        }
        if not places:
            return False
    return True


def _ancestors(path: str) -> Iterable[str]:
    yield path
    while "/" in path.rstrip("/")[1:]:
        path = path.rpartition("/")[0]
        yield path
    yield "/"


def _words(patterns: PatternSet) -> str:
    if patterns.other_than:
        return f"other than {' or '.join(patterns.other_than)}"
    return " or ".join(patterns.any_of)


def _value_test(patterns: PatternSet) -> Callable[[Iterable[str]], bool]:
    """A test of many values: one is covered, or (other_than) one is not covered."""
    globs = [glob(pattern) for pattern in (*patterns.any_of, *patterns.other_than)]

    def is_covered(value: str) -> bool:
        return any(covers(value) for covers in globs)

    if patterns.other_than:
        return lambda values: any(not is_covered(value) for value in values)
    return lambda values: any(is_covered(value) for value in values)


def _image_test(patterns: PatternSet) -> Callable[[Iterable[str]], bool]:
    """All names are one image: it is other than the patterns when none of its names is covered."""
    globs = [glob(pattern) for pattern in (*patterns.any_of, *patterns.other_than)]
    is_denied = bool(patterns.other_than)
    return lambda names: any(covers(name) for name in names for covers in globs) is not is_denied


def _path_test(patterns: PatternSet) -> Callable[[Iterable[str]], bool]:
    """Paths are compared as trees; names without a slash (CDI devices) as words."""
    plain = _value_test(patterns)
    trees = [path_glob(pattern) for pattern in (*patterns.any_of, *patterns.other_than)]

    def test(values: Iterable[str]) -> bool:
        paths: list[str] = []
        words: list[str] = []
        for value in values:
            (paths if value.startswith("/") else words).append(value)
        if plain(words):
            return True
        if patterns.other_than:
            return any(not any(is_inside(path) for is_inside, _ in trees) for path in paths)
        return any(does_reach(path) for path in paths for _, does_reach in trees)

    return test


def _capability_test(patterns: PatternSet) -> Callable[[Iterable[str]], bool]:
    """ALL is every capability, so it meets any pattern, and is other than any list."""
    spelled = PatternSet(
        any_of=[word.upper().removeprefix("CAP_") for word in patterns.any_of],
        other_than=[word.upper().removeprefix("CAP_") for word in patterns.other_than],
    )
    test = _value_test(spelled)
    if spelled.other_than:
        return test
    return lambda values: "ALL" in (listed := tuple(values)) or test(listed)


# ------------------------------------------------------------------------------------------------------------- compile
def compile_match(matches: Iterable[Match] | None, *, of_container: bool) -> Alternatives:
    """Turn the `match:` of a rule into checks. `of_container` says what `privileged` means."""
    return Alternatives(clauses=tuple(_clause(match, of_container=of_container) for match in matches or ()))


def _clause(match: Match, *, of_container: bool) -> Clause:
    checks: list[Check] = []
    add = checks.append

    if match.privileged is not None:
        if of_container:
            add(_flag("privileged", match.privileged, lambda subject: subject.container.privileged))
        else:
            add(_flag("privileged", match.privileged, lambda subject: subject.pod.privileged))
    if match.host_network is not None:
        add(_flag("hostNetwork", match.host_network, lambda subject: subject.pod.host_network))
    if match.host_pid is not None:
        add(_flag("hostPID", match.host_pid, lambda subject: subject.pod.host_pid))
    if match.host_ipc is not None:
        add(_flag("hostIPC", match.host_ipc, lambda subject: subject.pod.host_ipc))
    if match.userns is not None:
        add(_flag("userns", match.userns, lambda subject: subject.pod.userns))
    if match.seccomp_unconfined is not None:
        wanted = match.seccomp_unconfined
        add(_flag("seccomp_unconfined", wanted, lambda subject: subject.container.seccomp_unconfined))

    if match.namespace is not None:
        add(_values("namespace", match.namespace, lambda subject: (subject.pod.namespace,)))
    if match.name is not None:
        add(_values("name", match.name, lambda subject: (subject.pod.name,)))
    if match.handler is not None:
        add(_values("handler", match.handler, lambda subject: (subject.pod.handler,)))
    if match.runtime is not None:
        add(_values("runtime", match.runtime, lambda subject: (subject.container.runtime,)))
    if match.sysctls is not None:
        add(_values("sysctls", match.sysctls, lambda subject: subject.pod.sysctls))
    if match.qos is not None:
        classes = tuple(match.qos)
        add(
            Check(
                matcher="qos",
                wanted=" or ".join(classes),
                test=lambda subject: subject.pod.qos in classes,
                show=lambda subject: subject.pod.qos or "unknown",
            )
        )
    if match.cpu is not None:
        low, high = match.cpu.at_least, match.cpu.at_most
        add(_range("cpu", "m", low, high, lambda subject: subject.pod.cpu_millis))
    if match.memory is not None:
        low, high = match.memory.at_least, match.memory.at_most
        add(_range("memory", " bytes", low, high, lambda subject: subject.pod.memory_bytes))
    for key, value in match.labels.items():
        add(_entry("labels", key, value, lambda subject: subject.pod.labels))
    for key, value in match.annotations.items():
        add(_entry("annotations", key, value, lambda subject: subject.pod.annotations))

    if match.image is not None:
        add(_values("image", match.image, lambda subject: subject.container.images, _image_test))
    if match.capabilities is not None:
        read: Callable[[Subject], Iterable[str]] = lambda subject: subject.container.capabilities  # noqa: E731
        add(_values("capabilities", match.capabilities, read, _capability_test))
    if match.devices is not None:
        add(_values("devices", match.devices, lambda subject: subject.container.devices, _path_test))
    if match.host_mounts is not None:
        add(_values("host_mounts", match.host_mounts, lambda subject: subject.container.host_mounts, _path_test))
    if match.not_ is not None:
        add(_negation(compile_match(match.not_, of_container=of_container)))
    return tuple(checks)


def _flag(matcher: str, wanted: bool, read: Callable[[Subject], bool]) -> Check:
    return Check(
        matcher=matcher,
        wanted=str(wanted).lower(),
        test=lambda subject: read(subject) is wanted,
        show=lambda subject: str(read(subject)).lower(),
    )


def _values(
    matcher: str,
    patterns: PatternSet,
    read: Callable[[Subject], Iterable[str]],
    make_test: Callable[[PatternSet], Callable[[Iterable[str]], bool]] = _value_test,
) -> Check:
    test = make_test(patterns)
    return Check(
        matcher=matcher,
        wanted=_words(patterns),
        test=lambda subject: test(read(subject)),
        show=lambda subject: ", ".join(read(subject)) or "none",
    )


def _range(matcher: str, unit: str, low: int | None, high: int | None, read: Callable[[Subject], int | None]) -> Check:
    def test(subject: Subject) -> bool:
        value = read(subject)
        if value is None:
            return high is None
        return (low is None or value >= low) and (high is None or value <= high)

    def show(subject: Subject) -> str:
        value = read(subject)
        return "unlimited" if value is None else f"{value}{unit}"

    bounds = [f"at least {low}{unit}" if low is not None else "", f"at most {high}{unit}" if high is not None else ""]
    return Check(matcher=matcher, wanted=" and ".join(filter(None, bounds)) or "anything", test=test, show=show)


def _entry(matcher: str, key: str, value: ValueSet, read: Callable[[Subject], Mapping[str, str]]) -> Check:
    def show(subject: Subject) -> str:
        found = read(subject).get(key)
        return "absent" if found is None else f'"{found}"'

    name = f"{matcher}[{key}]"
    if value.exists is not None:
        wanted = value.exists
        word = "present" if wanted else "absent"
        return Check(matcher=name, wanted=word, test=lambda subject: (key in read(subject)) is wanted, show=show)
    test = _value_test(value)

    def test_entry(subject: Subject) -> bool:
        found = read(subject).get(key)
        return found is not None and test((found,))

    return Check(matcher=name, wanted=_words(value), test=test_entry, show=show)


def _negation(inner: Alternatives) -> Check:
    def show(subject: Subject) -> str:
        clause = inner.first_match(subject)
        if clause is None:
            return "no match"
        return " and ".join(f"{check.matcher} {check.show(subject)}" for check in clause) or "anything"

    wanted = " or ".join(
        " and ".join(f"{check.matcher} {check.wanted}" for check in clause) for clause in inner.clauses
    )
    return Check(
        matcher="not",
        wanted=wanted or "anything",
        test=lambda subject: inner.first_match(subject) is None,
        show=show,
    )
