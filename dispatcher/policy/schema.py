"""The shape of a policy file: names, types and closed sets of words. What the parts mean together is `compile`'s.

Names that Kubernetes has are spelled as there (`hostNetwork`), ours in snake case. Short forms (a word instead of a
list, a runtime's name instead of a mapping) are widened here, so that the rest of the package sees one form only.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dispatcher.model import Isolation
from dispatcher.quantities import milli_cpus, whole_bytes
from dispatcher.yaml_marks import did_you_mean

API_VERSION = "dispatcher/v1"
SCHEMA_ID = "urn:cri-dispatcher:policy:v1"

_NAME = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,62}[A-Za-z0-9])?", re.ASCII)
_HANDLER = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", re.ASCII)


def _name(text: str) -> str:
    if _NAME.fullmatch(text) is None:
        raise ValueError(
            f"{text[:80]!r} has to be 1 to 64 letters, digits, -, _ and ., and begin and end with a letter or digit"
        )
    return text


def _handler(text: str) -> str:
    if _HANDLER.fullmatch(text) is None:
        raise ValueError(f"{text[:80]!r} is no name of a RuntimeClass handler: a-z, 0-9, - and . are allowed")
    return text


def _isolation(word: Any) -> Any:
    if isinstance(word, str) and word in ISOLATIONS:
        return ISOLATIONS[word]
    if isinstance(word, Isolation):
        return word
    hint = did_you_mean(word, ISOLATIONS) if isinstance(word, str) else ""
    raise ValueError(f"{str(word)[:40]!r} is not one of {', '.join(ISOLATIONS)}.{hint}")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


def _pattern_set(value: Any) -> Any:
    return value if isinstance(value, dict | PatternSet) else {"any_of": _listed(value)}


def _value_match(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        # `key: true` in YAML is not the text "true" that an annotation holds.
        # pydantic reports a ValueError in its place; a TypeError would escape.
        raise ValueError(f'quote this: the value is text, such as "{str(value).lower()}"')  # noqa: TRY004
    return _pattern_set(value)


def _target(value: Any) -> Any:
    return {"runtime": value} if isinstance(value, str) else value


def _option(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, str) and len(value) > 256):
        raise ValueError("an option is true, false, a number or a text of up to 256 characters")
    return value


def _milli_cpus(value: Any) -> Any:
    return milli_cpus(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else value


def _bytes(value: Any) -> Any:
    return whole_bytes(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else value


ISOLATIONS = {level.label: level for level in Isolation}
IsolationWord = Literal["shared-kernel", "sandboxed", "vm"]

Name = Annotated[str, AfterValidator(_name)]
Handler = Annotated[str, AfterValidator(_handler)]
Pattern = Annotated[str, Field(min_length=1, max_length=256)]
Sentence = Annotated[str, Field(min_length=1, max_length=500)]
Level = Annotated[Isolation, BeforeValidator(_isolation, json_schema_input_type=IsolationWord)]
OptionWord = bool | int | float | str
OptionValue = Annotated[OptionWord, BeforeValidator(_option, json_schema_input_type=OptionWord)]
Quantity = str | int | float
MilliCpus = Annotated[int, BeforeValidator(_milli_cpus, json_schema_input_type=Quantity)]
Bytes = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=Quantity)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PatternSet(_Part):
    """Globs (`*` any text, `?` one character). `any_of` is what a plain word or list stands for.

    `other_than` matches where something is there that none of its globs covers: an allow-list, in a refusing rule.
    """

    any_of: list[Pattern] = []
    other_than: list[Pattern] = []

    @model_validator(mode="after")
    def _one(self) -> PatternSet:
        if bool(self.any_of) == bool(self.other_than):
            raise ValueError("a pattern, a list of patterns, or other_than with a list is expected here")
        return self


class ValueSet(PatternSet):
    """Patterns for a label's or annotation's value, or only whether the key is there."""

    exists: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> ValueSet:
        if (bool(self.any_of) + bool(self.other_than) + (self.exists is not None)) != 1:
            raise ValueError("a pattern, a list of patterns, other_than or exists is expected here")
        return self


class _OtherThan(_Part):
    other_than: list[Pattern]


_PatternForms = Pattern | list[Pattern] | _OtherThan
Patterns = Annotated[PatternSet, BeforeValidator(_pattern_set, json_schema_input_type=_PatternForms)]
Values = Annotated[ValueSet, BeforeValidator(_value_match, json_schema_input_type=Pattern | list[Pattern] | ValueSet)]


class CpuRange(_Part):
    """The pod's CPU limit. A pod without one has more than any number."""

    at_least: MilliCpus | None = None
    at_most: MilliCpus | None = None


class MemoryRange(_Part):
    """The pod's memory limit. A pod without one has more than any number."""

    at_least: Bytes | None = None
    at_most: Bytes | None = None


Qos = Literal["guaranteed", "burstable", "besteffort"]


class Match(_Part):
    """Conditions that all have to hold. Within one condition, a list means "one of these"."""

    namespace: Patterns | None = None
    name: Patterns | None = None
    labels: dict[str, Values] = {}
    annotations: dict[str, Values] = {}
    handler: Patterns | None = None
    privileged: bool | None = None
    host_network: Annotated[bool | None, Field(alias="hostNetwork")] = None
    host_pid: Annotated[bool | None, Field(alias="hostPID")] = None
    host_ipc: Annotated[bool | None, Field(alias="hostIPC")] = None
    userns: bool | None = None
    sysctls: Patterns | None = None
    qos: Annotated[list[Qos] | None, BeforeValidator(_listed, json_schema_input_type=Qos | list[Qos])] = None
    cpu: CpuRange | None = None
    memory: MemoryRange | None = None
    # Known at CreateContainer only:
    image: Patterns | None = None
    capabilities: Patterns | None = None
    devices: Patterns | None = None
    host_mounts: Patterns | None = None
    seccomp_unconfined: bool | None = None
    runtime: Patterns | None = None
    not_: Annotated[Alternatives | None, Field(alias="not")] = None


Alternatives = Annotated[
    list[Match], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=Match | list[Match])
]

# Matchers that have no answer yet when the runtime is chosen.
CONTAINER_MATCHERS = frozenset({"image", "capabilities", "devices", "host_mounts", "seccomp_unconfined", "runtime"})


class Target(_Part):
    """A runtime and its options."""

    runtime: str
    with_: Annotated[dict[str, OptionValue], Field(alias="with")] = {}


class HandlerTarget(Target):
    """What a RuntimeClass handler leads to."""

    trusted_only: bool = False


class Default(_Part):
    """What happens to a pod that nothing else decided."""

    runtime: str | None = None
    with_: Annotated[dict[str, OptionValue], Field(alias="with")] = {}
    refuse: Sentence | None = None

    @model_validator(mode="after")
    def _one(self) -> Default:
        if (self.runtime is None) == (self.refuse is None):
            raise ValueError("either runtime or refuse is expected here")
        if self.refuse is not None and self.with_:
            raise ValueError("with belongs to a runtime")
        return self


class Rule(_Part):
    """One rule: when, and then what."""

    name: Name
    description: str = ""
    phase: Literal["sandbox", "container"] = "sandbox"
    match: Alternatives | None = None
    runtime: str | None = None
    with_: Annotated[dict[str, OptionValue], Field(alias="with")] = {}
    refuse: Sentence | None = None
    trusted_only: bool = False

    @model_validator(mode="after")
    def _one(self) -> Rule:
        if (self.runtime is None) == (self.refuse is None):
            raise ValueError("a rule has either runtime or refuse")
        if self.refuse is not None and (self.with_ or self.trusted_only):
            raise ValueError("with and trusted_only belong to a rule that names a runtime")
        return self


class Hooks(_Part):
    """Which plugins' votes may win over the rules."""

    may_override: list[str] = []


# --------------------------------------------------------------------------------------------------------------- tests
class TestPod(_Part):
    """A pod of a test case; what is left out is absent, or the default of a plain pod."""

    __test__ = False

    namespace: str = "default"
    name: str = "pod"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    handler: str = ""
    privileged: bool = False
    host_network: Annotated[bool, Field(alias="hostNetwork")] = False
    host_pid: Annotated[bool, Field(alias="hostPID")] = False
    host_ipc: Annotated[bool, Field(alias="hostIPC")] = False
    userns: bool = False
    sysctls: list[str] = []
    qos: Qos | None = None
    cpu: MilliCpus | None = None
    memory: Bytes | None = None


class TestContainer(_Part):
    """A container of a test case: with it, the container rules are tested after the pod was routed."""

    __test__ = False

    image: str = "docker.io/library/busybox:latest"
    privileged: bool = False
    capabilities: list[str] = []
    devices: list[str] = []
    host_mounts: list[str] = []
    seccomp_unconfined: bool = False


class TestVote(_Part):
    """A vote that a hook is assumed to have cast."""

    __test__ = False

    plugin: str
    runtime: str


class Expectation(_Part):
    """What has to come out: a runtime (and the rule that chose it), or a refusal (by a rule)."""

    runtime: str | None = None
    rule: str | None = None
    refused: bool = False

    @model_validator(mode="after")
    def _one(self) -> Expectation:
        if self.refused == (self.runtime is not None):
            raise ValueError("either runtime or refused: true is expected here")
        return self


class TestCase(_Part):
    """One of the file's own test cases; the file is loaded only when all of them come out as they say."""

    __test__ = False

    name: Sentence
    pod: TestPod = TestPod()
    container: TestContainer | None = None
    votes: list[TestVote] = []
    expect: Expectation


# ---------------------------------------------------------------------------------------------------------------- file
class PolicyFile(_Part):
    """A whole policy file."""

    api_version: Annotated[Literal["dispatcher/v1"], Field(alias="apiVersion")]
    runtimes: dict[str, Level] = {}
    handlers: dict[
        Handler, Annotated[HandlerTarget, BeforeValidator(_target, json_schema_input_type=str | HandlerTarget)]
    ] = {}
    floors: dict[Pattern, Level] = {}
    trusted: list[Pattern] = []
    hooks: Hooks = Hooks()
    rules: list[Rule] = []
    default: Annotated[Default, BeforeValidator(_target, json_schema_input_type=str | Default)]
    tests: list[TestCase] = []


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of policy files, for editors."""
    schema = PolicyFile.model_json_schema(by_alias=True, mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}
