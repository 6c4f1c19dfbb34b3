"""YAML with positions: what is wrong is named with file, line and column, all at once, and nothing hostile gets far."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from dispatcher.yaml_marks import (
    MAX_BYTES,
    MAX_DEPTH,
    Mark,
    Problem,
    YamlError,
    did_you_mean,
    load,
    spell,
    validate,
)


class Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Cat(Model):
    kind: Literal["cat"]
    purrs: bool = True


class Dog(Model):
    kind: Literal["dog"]
    barks_per_minute: int = 1


class Rule(Model):
    name: str
    mode: Literal["automatic", "manual"] = "automatic"
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None
    also: tuple[Cat | Dog, ...] = ()


class Root(Model):
    rules: tuple[Rule, ...] = ()
    by_name: dict[str, Rule] = {}
    number: int = 1
    ratio: float = 1.0
    on: bool = True


def problems(text: str) -> list[str]:
    with pytest.raises(YamlError) as caught:
        validate(load(text, "f.yaml"), Root)
    return str(caught.value).split("\n")


def test_plain_data_and_where_it_stands() -> None:
    document = load("rules:\n- name: a\n  mode: manual\nnumber: 3\n", "f.yaml")
    assert document.data == {"rules": [{"name": "a", "mode": "manual"}], "number": 3}
    assert document.mark(("rules", 0, "mode")) == Mark(3, 9)
    assert document.mark(("rules", 0, "mode"), key=True) == Mark(3, 3)
    assert document.mark(("rules", 0, "missing", "deeper")) == Mark(2, 3)
    assert document.mark(("nowhere",)) == Mark(1, 1)
    assert validate(document, Root).rules[0].mode == "manual"


def test_an_empty_text_is_an_empty_mapping() -> None:
    assert load("", "f").data is None
    assert load("# only words\n", "f").data is None
    assert validate(load("", "f"), Root).number == 1


def test_scalars_mean_what_they_look_like() -> None:
    document = load(
        "a: no\nb: 012\nc: 1:30\nd: 0x1f\ne: -5\nf: 1.5\ng: true\nh: ~\ni: null\nj: 'true'\nk: 2024-01-01\nl:\nm: 1e3\n"
        "n: .inf\no: on\np: 0o17\nq: +7\nr: 00.5\ns: |\n  text\n",
        "f",
    )
    assert document.data == {
        "a": "no", "b": "012", "c": "1:30", "d": 31, "e": -5, "f": 1.5, "g": True, "h": None, "i": None, "j": "true",
        "k": "2024-01-01", "l": None, "m": 1000.0, "n": ".inf", "o": "on", "p": 15, "q": 7, "r": "00.5", "s": "text\n",
    }  # fmt: skip


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    found = problems(
        "rules:\n- nmae: a\n- name: b\n  mode: automatc\nnumber: 012\non: yes\nby_name:\n  x: {name: 5}\nnumbr: 4\n"
    )
    assert found == [
        'f.yaml:2:3: rules[0]: the key "name" is missing',
        'f.yaml:2:3: rules[0].nmae: unknown key. Did you mean "name"?',
        "f.yaml:4:9: rules[1].mode: 'automatc' is not one of automatic, manual. Did you mean \"automatic\"?",
        "f.yaml:5:9: number: should be a valid integer, not '012'",
        "f.yaml:6:5: on: should be a valid boolean, not 'yes'",
        "f.yaml:8:13: by_name.x.name: should be a valid string, not 5",
        'f.yaml:9:1: numbr: unknown key. Did you mean "number"?',
    ]


def test_suggestions_reach_into_unions() -> None:
    found = problems("rules:\n- name: a\n  pet: {kind: dog, barks_per_minut: 3}\n- name: b\n  pet: {kind: dgo}\n")
    assert found[0] == 'f.yaml:3:20: rules[0].pet.barks_per_minut: unknown key. Did you mean "barks_per_minute"?'
    assert found[1].startswith("f.yaml:5:8: rules[1].pet: 'dgo' is not one of ")
    assert 'Did you mean "dog"?' in found[1]
    assert any("purrs" in line for line in problems("rules: [{name: a, also: [{kind: cat, purs: true}]}]\n"))


def test_a_part_of_a_document_can_be_validated() -> None:
    document = load("outer:\n  inner:\n    name: a\n    mod: x\n", "f.yaml")
    with pytest.raises(YamlError, match=r'f\.yaml:4:5: outer\.inner\.mod: unknown key\. Did you mean "mode"\?'):
        validate(document, Rule, ("outer", "inner"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3:1: a: this key stands already in line 1"),
        ("a: {b: 1, b: 2}\n", "f:1:11: a.b: this key stands already in line 1"),
        ("a: [1, 2\n", "f:2:1: "),
        ("a: 'x", "f:1:6: "),
        ("a: !!python/object/apply:os.system [x]", "f:1:4: tag tag:yaml.org,2002:python/object/apply:os.system is not"),
        ("a: !secret x", "f:1:4: tag !secret is not allowed"),
        ("? [1, 2]\n: 3\n", "f:1:3: a key has to be a plain word"),
        ("a: *nowhere\n", "alias"),
        ("a: &self [*self]\n", "f:1:11: alias *self refers to nothing that is complete"),
        ("base: &b {x: 1}\nc:\n  <<: *b\n", "f:3:3: merge keys"),
        ("--- 1\n--- 2\n", "f:2:1: only one document"),
        ("a: \x01\n", "f:1:"),
    ],
)
def test_what_is_not_allowed_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(YamlError) as caught:
        load(text, "f")
    assert message in str(caught.value)


def test_keys_that_occur_twice_are_all_named() -> None:
    with pytest.raises(YamlError) as caught:
        load("a: 1\na: 2\nb:\n  c: 1\n  c: 2\n", "f")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000, "a:\n" + " " * 5 + "- " * 70 + "x"])
def test_depth_is_bounded(text: str) -> None:
    with pytest.raises(YamlError, match=f"nested deeper than {MAX_DEPTH} levels|YAML|nesting"):
        load(text, "f")


def test_aliases_cannot_multiply() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    began = time.perf_counter()
    with pytest.raises(YamlError, match="more than 100000 values"):
        load("\n".join(lines), "f")
    assert time.perf_counter() - began < 5


def test_size_is_bounded() -> None:
    with pytest.raises(YamlError, match="larger than 4 MiB"):
        load("#" * (MAX_BYTES + 1), "f")


def test_bytes_have_to_be_utf_8() -> None:
    assert load("ä: ö\n".encode(), "f").data == {"ä": "ö"}
    assert load(b"\xef\xbb\xbfa: 1\n", "f").data == {"a": 1}
    with pytest.raises(YamlError, match="not UTF-8"):
        load(b"a: \xff\n", "f")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:-[]{}#&*!|>'\"%@`,? \n\t<\\0123.~\x00\x85\u2028", max_size=60))
def test_no_text_does_worse_than_a_named_problem(text: str) -> None:
    found: tuple[Problem, ...] = ()
    try:
        validate(load(text, "f"), Root)
    except YamlError as error:
        found = error.problems
        assert found != ()
    assert all(problem.line >= 1 and problem.column >= 1 for problem in found)


def test_paths_and_suggestions_are_spelt_for_people() -> None:
    assert spell(("rules", 2, "when", "labels")) == "rules[2].when.labels"
    assert spell(()) == ""
    assert did_you_mean("dokcer", ["docker", "hyper_vm"]) == ' Did you mean "docker"?'
    assert did_you_mean("zzz", ["docker"]) == ""
