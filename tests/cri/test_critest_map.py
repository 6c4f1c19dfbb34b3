"""The table from conformance specs to our tests is complete and points at tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.cri.critest_map import MAP

HERE = Path(__file__).parent
SPECS = (HERE / "critest_specs.txt").read_text().splitlines()


def test_the_list_is_that_of_the_validation_suite() -> None:
    assert len(SPECS) == len(set(SPECS)) == 137


def test_every_spec_is_mapped_and_nothing_else_is() -> None:
    assert sorted(set(SPECS) - set(MAP)) == []
    assert sorted(set(MAP) - set(SPECS)) == []


@pytest.mark.parametrize(
    "file", sorted({test.partition("::")[0] for v in MAP.values() if not isinstance(v, str) for test in v})
)
def test_every_mapped_test_exists(file: str) -> None:
    tree = ast.parse((HERE / file).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {
        test.partition("::")[2]
        for value in MAP.values()
        if not isinstance(value, str)
        for test in value
        if test.startswith(f"{file}::")
    }
    assert sorted(named - functions) == []


def test_a_spec_without_a_test_has_a_reason() -> None:
    assert all(MAP.values())
