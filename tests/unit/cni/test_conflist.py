"""What is a network configuration and what is not, as libcni decides it, with a sentence for each refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dispatcher_cni.conflist import BadConfig, parse_list, parse_single
from dispatcher_cni.strict_json import LIMIT_BYTES
from dispatcher_cni.versions import choose_version, version_key

PLUGIN = {"type": "bridge"}


def list_of(**changes: Any) -> bytes:
    """A list that can be used, but for the changes; None takes a key out."""
    top = {"cniVersion": "1.0.0", "name": "net", "plugins": [PLUGIN], **changes}
    return json.dumps({key: value for key, value in top.items() if value is not None}).encode()


def test_list_keeps_what_belongs_to_plugins() -> None:
    """Keys that we do not know, and their order, reach the plugins unchanged."""
    plugin = {"type": "bridge", "x": {"deep": [1, 2.5, None, "ä"]}, "capabilities": {"mac": True, "ips": False}}
    network = parse_list(list_of(plugins=[plugin, {"type": "firewall"}], disableCheck="TRUE", disableGC=True))
    assert network.plugins[0] == plugin
    assert network.types == ("bridge", "firewall")
    assert network.capabilities == {"mac"}
    assert network.disable_check
    assert network.disable_gc


def test_single_plugin_is_a_chain_of_one() -> None:
    """The old form, `.conf` and `.json`, has the same meaning as a list with one plugin."""
    network = parse_single(b'{"cniVersion": "0.3.1", "name": "old", "type": "ptp", "ipam": {"type": "host-local"}}')
    assert (network.name, network.cni_version, network.types) == ("old", "0.3.1", ("ptp",))
    assert network.executables == ("ptp", "host-local")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Line 1, column 1 is not JSON"),
        (b'{"name": "x",\n "plugins": [}', "Line 2, column 14 is not JSON"),
        (b"[]", "must be one JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"name": "\\ud800"}', "not UTF-8"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b'{"a": ' + b"[" * 100_000, "not usable JSON"),
        (b" " * (LIMIT_BYTES + 1), "larger than"),
        (list_of(name=None), "'name' must be"),
        (list_of(name="../../etc"), "'name' must be"),
        (list_of(name=""), "'name' must be"),
        (list_of(name=7), "'name' must be"),
        (list_of(cniVersion="1"), "'cniVersion': '1' is not a version"),
        (list_of(cniVersion=1.0), "'cniVersion' must be a text"),
        (list_of(cniVersions="1.0.0"), "'cniVersions' must be a list"),
        (list_of(cniVersions=["1.0.0", 3]), "'cniVersion' must be a text"),
        (list_of(plugins=None), "no plugins"),
        (list_of(plugins=[]), "at least one plugin"),
        (list_of(plugins={}), "at least one plugin"),
        (list_of(plugins=["bridge"]), "In plugin 1: a plugin must be a JSON object"),
        (list_of(plugins=[PLUGIN, {}]), "In plugin 2: 'type' must be the name"),
        (list_of(plugins=[{"type": "../sh"}]), "'type' must be the name"),
        (list_of(plugins=[{"type": ".."}]), "'type' must be the name"),
        (list_of(plugins=[{"type": "a b"}]), "'type' must be the name"),
        (list_of(plugins=[{"type": "x", "capabilities": ["mac"]}]), "'capabilities' must map"),
        (list_of(plugins=[{"type": "x", "capabilities": {"mac": "yes"}}]), "'capabilities' must map"),
        (list_of(plugins=[{"type": "x", "ipam": []}]), "'ipam' must be"),
        (list_of(plugins=[{"type": "x", "ipam": {"type": "/bin/sh"}}]), "'ipam.type' must be the name"),
        (list_of(disableCheck="maybe"), "'disableCheck' must be true or false"),
        (list_of(disableGC=1), "'disableGC' must be true or false"),
        (list_of(plugins=None, loadOnlyInlinedPlugins=True), "there are no 'plugins'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(data: bytes, words: str) -> None:
    """Every refusal says what is wrong, and nothing else is ever raised."""
    with pytest.raises(BadConfig, match=words.replace("[", r"\[")):
        parse_list(data)


def test_list_in_a_conf_file_is_told_apart() -> None:
    """A frequent mistake gets its own sentence."""
    with pytest.raises(BadConfig, match=r"ends in \.conflist"):
        parse_single(list_of())


def test_null_stands_for_absent() -> None:
    """Installers that write every field, in languages that have null, are understood."""
    network = parse_list(list_of(plugins=[{"type": "x", "ipam": None, "capabilities": None}]))
    assert network.plugins == ({"type": "x"},)


def test_folder_of_the_networks_name_adds_plugins() -> None:
    """CNI 1.1: files beside the list join the chain by name, unless the list says that it is complete."""
    files = {"20.conf": b'{"type": "later"}', "10.conf": b'{"type": "sooner"}'}
    asked = []

    def read_folder(name: str) -> dict[str, bytes]:
        asked.append(name)
        return files

    assert parse_list(list_of(), read_folder=read_folder).types == ("bridge", "sooner", "later")
    assert parse_list(list_of(plugins=None), read_folder=read_folder).types == ("sooner", "later")
    assert parse_list(list_of(loadOnlyInlinedPlugins=True), read_folder=read_folder).types == ("bridge",)
    assert asked == ["net", "net"]
    files["10.conf"] = b"oops"
    with pytest.raises(BadConfig, match="not JSON"):
        parse_list(list_of(), read_folder=read_folder)


@pytest.mark.parametrize(
    ("single", "several", "chosen"),
    [
        (None, [], "0.1.0"),
        ("0.4.0", [], "0.4.0"),
        ("0.4.0", ["1.0.0", "0.3.1"], "1.0.0"),
        ("1.1.0", ["1.0.0"], "1.1.0"),
        ("1.0.0", ["2.0.0", "1.1.0", "10.0.0"], "1.1.0"),
        ("2.0.0", [], "2.0.0"),
        (None, ["0.10.0", "0.9.0"], "0.10.0"),
    ],
)
def test_newest_version_that_both_know_is_spoken(single: str | None, several: list[str], chosen: str) -> None:
    """A newer one than ours is kept only where there is no other, so that its refusal names it."""
    assert choose_version(single, several) == chosen


@pytest.mark.parametrize("text", ["", "1", "1.0", "1.0.0.0", "01.0.0", "1.0.0-rc1", "1.0.x", "¹.0.0", "1.0.0\n"])
def test_versions_have_three_numbers(text: str) -> None:
    """Anything else is no version."""
    with pytest.raises(ValueError):
        version_key(text)
