"""`config check`: every problem with its place, and an exit code."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from dispatcher.commands import cli
from dispatcher.commands.output import Console

POLICY = "apiVersion: dispatcher/v1\nruntimes: {docker: shared-kernel}\ndefault: {runtime: docker}\n"


def check(folder: Path, config: str, policy: str | None = POLICY) -> tuple[int, list[str]]:
    file = folder / "dispatcher.yaml"
    file.write_text(f"policy: {folder}/policy.yaml\n{config}")
    if policy is not None:
        (folder / "policy.yaml").write_text(policy)
    out = io.StringIO()
    args = cli.build_parser().parse_args(["config", "check", "--config", str(file)])
    return cli.run(args, Console(out, io.StringIO())), out.getvalue().splitlines()


def test_a_good_configuration(tmp_path: Path) -> None:
    code, lines = check(tmp_path, "plugins: {enabled: []}\n")
    assert (code, lines[-1]) == (0, "ok")


def test_a_misspelt_key_is_named_with_its_place(tmp_path: Path) -> None:
    code, lines = check(tmp_path, "plugins: {enabled: []}\nstate_dri: /x\n")
    assert code == 1
    assert lines[0].startswith(f"{tmp_path}/dispatcher.yaml:3:1: ")
    assert "state_dir" in lines[0]


def test_a_section_is_checked_by_its_plugin(tmp_path: Path) -> None:
    code, lines = check(tmp_path, "plugins:\n  enabled: [cni]\n  cni:\n    conf_dirs: [relative]\n")
    assert code == 1
    assert any(line.startswith(f"{tmp_path}/dispatcher.yaml:5:") for line in lines)


def test_a_policy_is_checked_with_its_own_tests(tmp_path: Path) -> None:
    code, lines = check(tmp_path, "plugins: {enabled: []}\n", POLICY.replace("docker}", "dokcer}"))
    assert code == 1
    assert any("policy.yaml:3:" in line and "docker" in line for line in lines)


@pytest.mark.parametrize("policy", [None, "", "{", "a: [" * 100])
def test_a_policy_that_cannot_be_read(tmp_path: Path, policy: str | None) -> None:
    code, lines = check(tmp_path, "plugins: {enabled: []}\n", policy)
    assert code == 1
    assert lines[0].startswith(f"{tmp_path}/policy.yaml:")


def test_a_missing_file(tmp_path: Path) -> None:
    out = io.StringIO()
    args = cli.build_parser().parse_args(["config", "check", "--config", str(tmp_path / "no.yaml"), "-o", "json"])
    assert cli.run(args, Console(out, io.StringIO(), as_json=True)) == 1
    assert json.loads(out.getvalue())["problems"] == [
        f"{tmp_path}/no.yaml:1:1: cannot be read: No such file or directory"
    ]
