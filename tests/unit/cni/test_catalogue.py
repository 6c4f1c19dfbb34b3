"""Which file of the configuration folders is the network, and how changes are seen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dispatcher_cni.catalogue import Catalogue


def write(path: Path, name: str) -> None:
    """Write a configuration in the form that the file's name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plugin = {"type": "bridge"}
    top = {"name": name, "cniVersion": "1.0.0"}
    path.write_text(json.dumps({**top, "plugins": [plugin]} if path.suffix == ".conflist" else {**top, **plugin}))


def chosen(catalogue: Catalogue) -> str:
    """The network's name after a look, "" for none."""
    catalogue.refresh()
    return catalogue.network.name if catalogue.network else ""


@pytest.mark.parametrize(
    ("files", "first"),
    [
        (["10-a.conf", "05-b.conflist", "20-c.json"], "05-b.conflist"),
        (["10-a.conflist", "10-a.conf"], "10-a.conf"),
        (["9.conf", "10.conf"], "10.conf"),
        (["a.conf", "Z.conf"], "Z.conf"),
        (["1.conf.bak", "2.CONF", ".conf", "notes", "5.conf"], "5.conf"),
        (["ä.conf", "z.conf"], "z.conf"),
    ],
)
def test_files_are_sorted_by_name_whatever_their_ending(tmp_path: Path, files: list[str], first: str) -> None:
    """Order is libcni's: bytewise by the whole name; other endings do not count."""
    for name in files:
        write(tmp_path / name, name.encode().hex())
    assert bytes.fromhex(chosen(Catalogue((tmp_path,)))).decode() == first


def test_folders_come_in_their_order(tmp_path: Path) -> None:
    """A later folder counts only while the earlier ones have nothing."""
    catalogue = Catalogue((tmp_path / "one", tmp_path / "two"))
    assert chosen(catalogue) == ""
    write(tmp_path / "two" / "10.conf", "two")
    assert chosen(catalogue) == "two"
    write(tmp_path / "one" / "90.conf", "one")
    assert chosen(catalogue) == "one"
    (tmp_path / "one" / "90.conf").unlink()
    assert chosen(catalogue) == "two"


def test_unusable_file_is_told_and_passed_over(tmp_path: Path) -> None:
    """A broken file that sorts first does not keep the node down, and is never passed over in silence."""
    (tmp_path / "05.conflist").write_text("{")
    (tmp_path / "06.conf").symlink_to("nowhere")
    os.mkfifo(tmp_path / "07.conf")
    (tmp_path / "08.conf").mkdir()
    write(tmp_path / "10.conf", "fine")
    catalogue = Catalogue((tmp_path,))
    assert chosen(catalogue) == "fine"
    assert [problem.removeprefix(str(tmp_path)).partition(": ")[0] for problem in catalogue.problems] == [
        "/05.conflist",
        "/06.conf",
        "/07.conf",
    ]


def test_serving_file_that_breaks_goes_on_serving(tmp_path: Path) -> None:
    """Half a rewrite must not send pods to the next network; a removal does."""
    write(tmp_path / "10.conf", "first")
    write(tmp_path / "20.conf", "second")
    catalogue = Catalogue((tmp_path,))
    assert chosen(catalogue) == "first"
    (tmp_path / "10.conf").write_text("{")
    assert chosen(catalogue) == "first"
    assert "last good content" in catalogue.problems[0]
    (tmp_path / "10.conf").write_text("{{")
    assert chosen(catalogue) == "first"
    (tmp_path / "10.conf").unlink()
    assert chosen(catalogue) == "second"
    assert catalogue.problems == ()


def test_refresh_tells_whether_something_changed(tmp_path: Path) -> None:
    """Looking again at the same files is no change, replacing one by rename is."""
    write(tmp_path / "10.conf", "first")
    catalogue = Catalogue((tmp_path,))
    assert [catalogue.refresh(), catalogue.refresh()] == [True, False]
    write(tmp_path / "new", "other")
    (tmp_path / "new").replace(tmp_path / "10.conf")
    assert [catalogue.refresh(), catalogue.refresh()] == [True, False]
    assert chosen(catalogue) == "other"


def test_plugins_in_the_networks_folder_are_watched(tmp_path: Path) -> None:
    """A file that joins or leaves the chain is a change of the network."""
    write(tmp_path / "10.conflist", "net")
    catalogue = Catalogue((tmp_path,))
    catalogue.refresh()
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "50.conf").write_text('{"type": "more"}')
    catalogue.refresh()
    assert catalogue.network is not None
    assert catalogue.network.types == ("bridge", "more")
    (tmp_path / "net" / "50.conf").write_text('{"type": "other"}')
    catalogue.refresh()
    assert catalogue.network.types == ("bridge", "other")
