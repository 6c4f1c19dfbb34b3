"""Commands that plugins bring: listed without being imported, loaded when asked for, and no harm when broken."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from dispatcher.commands import cli


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands of plugins: one that works, one that does not; and one that wants the name of ours."""
    points = [
        metadata.EntryPoint("greet", "tests.unit.commands.greet", cli.COMMANDS_GROUP),
        metadata.EntryPoint("broken", "tests.unit.commands.no_such_module", cli.COMMANDS_GROUP),
        metadata.EntryPoint("ps", "tests.unit.commands.no_such_module", cli.COMMANDS_GROUP),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda **_fields: points)


@pytest.mark.usefixtures("brought")
def test_it_is_loaded_when_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """And runs like one of ours."""
    assert list(cli.plugin_commands()) == ["broken", "greet"]
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "commands of plugins: broken, greet" in capsys.readouterr().out
    assert "tests.unit.commands.greet" not in sys.modules
    assert cli.main(["greet", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    assert cli.main(["greet", "nobody"]) == 4
    assert "nobody is here" in capsys.readouterr().err


@pytest.mark.usefixtures("brought")
def test_a_broken_one_harms_nobody_else(capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, and ends with 1; ours keep their names."""
    assert cli.main(["broken"]) == 1
    assert "the command broken" in capsys.readouterr().err
    assert cli.build_parser(["ps"]).parse_args(["ps"]).command == "ps"
