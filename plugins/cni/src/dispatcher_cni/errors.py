"""Failures of network plugins, by what a caller inside this package does about them."""

from __future__ import annotations

from dispatcher.errors import NetworkFailed
from dispatcher_cni.result import PluginError

UNKNOWN_CONTAINER = 3  # the specification's code for: nothing of this container is here, nothing is to be cleaned up


class PluginFailed(NetworkFailed):
    """A plugin ran and failed, hung, or answered nonsense."""

    def __init__(self, plugin: str, command: str, error: PluginError) -> None:
        super().__init__(f"The network plugin {plugin} failed at {command}: {error.text}.", plugin=plugin)
        self.plugin = plugin
        self.error = error


class PluginMissing(NetworkFailed):
    """A plugin's executable is not in any of the folders."""

    def __init__(self, plugin: str, folders: tuple[str, ...]) -> None:
        super().__init__(
            f"The network plugin {plugin} is not in {', '.join(folders)}: install it there, or correct "
            f"plugins.cni.bin_dirs.",
            plugin=plugin,
        )
        self.plugin = plugin
