"""Reading network configurations: `.conflist` (a chain of plugins) and the older `.conf`/`.json` (one plugin). Pure.

The files are the operator's, but they are written by installers in many languages, often while we look: whatever they
hold, the result is a NetworkConfig or BadConfig with a sentence for a person, never another exception. What we do not
know we keep as it is, because it belongs to a plugin.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dispatcher_cni.strict_json import NotStrictJson, load_object
from dispatcher_cni.versions import choose_version, version_key

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")
_PLUGIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")


class BadConfig(ValueError):
    """A configuration that cannot be used; the text says why, in a sentence without the file's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """One network: its name, the version to speak, and the plugins in the order of ADD, as plain JSON objects."""

    name: str
    cni_version: str
    plugins: tuple[Mapping[str, Any], ...]
    disable_check: bool = False
    disable_gc: bool = False
    source: str = ""

    @property
    def types(self) -> tuple[str, ...]:
        """The plugins' names, which are names of executables."""
        return tuple(plugin["type"] for plugin in self.plugins)

    @property
    def executables(self) -> tuple[str, ...]:
        """All names of executables that the chain needs, those for addresses (IPAM) too; each once, in order."""
        names = [name for plugin in self.plugins for name in (plugin["type"], ipam_type(plugin)) if name]
        return tuple(dict.fromkeys(names))

    @property
    def capabilities(self) -> frozenset[str]:
        """What some plugin of the chain wants to be told about each pod."""
        return frozenset(name for plugin in self.plugins for name in declared_capabilities(plugin))


def ipam_type(plugin: Mapping[str, Any]) -> str:
    """Return the name of the plugin that this one asks for addresses, or ""."""
    return str(plugin.get("ipam", {}).get("type", ""))


def declared_capabilities(plugin: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the capabilities that a plugin's configuration switches on."""
    return tuple(name for name, wanted in plugin.get("capabilities", {}).items() if wanted)


def parse_list(
    data: bytes, *, source: str = "", read_folder: Callable[[str], Mapping[str, bytes]] = lambda _: {}
) -> NetworkConfig:
    """Read a `.conflist`. `read_folder(network name)` gives the files of the folder beside it, which add plugins.

    Raises:
        BadConfig: it cannot be used.
    """
    top = _load(data)
    name = _network_name(top)
    version = _version(top)
    only_inlined = _flag(top, "loadOnlyInlinedPlugins")
    plugins: list[Mapping[str, Any]] = []
    if "plugins" in top:
        inlined = top["plugins"]
        if not isinstance(inlined, list) or not inlined:
            raise BadConfig("'plugins' must be a list with at least one plugin.")
        plugins = [_plugin(item, f"plugin {number}") for number, item in enumerate(inlined, 1)]
    elif only_inlined:
        raise BadConfig("'loadOnlyInlinedPlugins' is true, but there are no 'plugins'.")
    if not only_inlined:
        plugins += [_plugin(_load(text), file) for file, text in sorted(read_folder(name).items())]
    if not plugins:
        raise BadConfig("The network has no plugins.")
    return NetworkConfig(
        name=name,
        cni_version=version,
        plugins=tuple(plugins),
        disable_check=_flag(top, "disableCheck"),
        disable_gc=_flag(top, "disableGC"),
        source=source,
    )


def parse_single(data: bytes, *, source: str = "") -> NetworkConfig:
    """Read a `.conf` or `.json`, which holds one plugin, as a network of that plugin alone.

    Raises:
        BadConfig: it cannot be used.
    """
    top = _load(data)
    if "plugins" in top and "type" not in top:
        raise BadConfig("This is a list of plugins: give the file a name that ends in .conflist.")
    plugin = _plugin(top, "the plugin")
    return NetworkConfig(name=_network_name(top), cni_version=_version(top), plugins=(plugin,), source=source)


def _load(data: bytes) -> dict[str, Any]:
    try:
        return load_object(data)
    except NotStrictJson as error:
        raise BadConfig(str(error)) from None


def _network_name(top: Mapping[str, Any]) -> str:
    name = top.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadConfig("'name' must be letters, digits, '_', '.' and '-', and begin with a letter or digit.")
    return name


def _version(top: Mapping[str, Any]) -> str:
    single = top.get("cniVersion") or None
    several = top.get("cniVersions", [])
    if not isinstance(several, list):
        raise BadConfig("'cniVersions' must be a list.")
    try:
        for version in (*several, *([single] if single is not None else ())):
            if not isinstance(version, str):
                raise BadConfig("'cniVersion' must be a text such as \"1.0.0\".")
            version_key(version)
    except ValueError as error:
        raise error if isinstance(error, BadConfig) else BadConfig(f"'cniVersion': {error}.") from None
    return choose_version(single, several)


def _flag(top: Mapping[str, Any], key: str) -> bool:
    """Read a boolean, which libcni also takes as a word."""
    value = top.get(key, False)
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        raise BadConfig(f"'{key}' must be true or false.")
    return value


def _plugin(item: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(item, dict):
        raise BadConfig(f"In {where}: a plugin must be a JSON object.")
    _require_executable(item.get("type"), f"In {where}: 'type'")
    plugin = {key: value for key, value in item.items() if value is not None or key not in {"capabilities", "ipam"}}
    capabilities, ipam = plugin.get("capabilities", {}), plugin.get("ipam", {})
    if not isinstance(capabilities, dict) or not all(isinstance(value, bool) for value in capabilities.values()):
        raise BadConfig(f"In {where}: 'capabilities' must map names to true or false.")
    if not isinstance(ipam, dict):
        raise BadConfig(f"In {where}: 'ipam' must be a JSON object.")
    if ipam.get("type", "") != "":
        _require_executable(ipam["type"], f"In {where}: 'ipam.type'")
    return plugin


def _require_executable(name: Any, what: str) -> None:
    """A plugin's name is looked up in folders of programs, so it must not lead out of them."""
    if not isinstance(name, str) or not _PLUGIN.fullmatch(name) or name in {".", ".."}:
        raise BadConfig(f"{what} must be the name of a plugin's executable.")
