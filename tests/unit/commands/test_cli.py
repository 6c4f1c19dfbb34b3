"""The command line as a whole: help, documentation, errors, exit codes."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys

import pytest

from dispatcher.commands import cli
from dispatcher.commands.output import Console, Exit, Failure
from scripts import cli_docs


def test_the_documentation_is_what_the_program_says() -> None:
    assert cli_docs.TARGET.read_text() == cli_docs.render(), "run `python scripts/cli_docs.py`"


def test_every_command_and_every_argument_has_help() -> None:
    names = [name for name, _ in cli_docs.commands()]
    assert {name.split()[0] for name in names} == {name for name, _, _ in cli.COMMANDS}
    for name, parser in cli_docs.commands():
        assert parser.description, name
        for action in cli_docs.visible(parser):
            assert action.help, f"{name} {cli_docs.spell(action)}"
        assert parser.format_help()


@pytest.mark.parametrize("name", [name for name, _, _ in cli.COMMANDS])
def test_help_ends_well(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.build_parser().parse_args([*name.split(), "--help"])
    assert end.value.code == 0
    assert "usage: dispatcher" in capsys.readouterr().out


def end(effect: BaseException | int) -> tuple[int, str]:
    def execute(_args: argparse.Namespace, _console: Console) -> int:
        if isinstance(effect, BaseException):
            raise effect
        return effect

    err = io.StringIO()
    return cli.run(argparse.Namespace(execute=execute), Console(io.StringIO(), err)), err.getvalue()


def test_endings() -> None:
    assert end(7) == (7, "")
    assert end(Failure("no", hint="do", code=Exit.NOT_FOUND)) == (4, "dispatcher: no\n  -> do\n")
    assert end(KeyboardInterrupt()) == (130, "")


def test_commands_do_not_load_what_they_do_not_need() -> None:
    """`--help` and `version` come at once: gRPC, pydantic and plugins are loaded by those who use them."""
    code = (
        "import sys; from dispatcher.commands import cli; cli.build_parser();"
        "heavy = {'grpc', 'pydantic', 'docker', 'prometheus_client', 'yaml'} & set(sys.modules); print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m dispatcher --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
