"""The plugin host: finds plugins, chooses providers, and stands between them and the core."""

from dispatcher.registry.registry import Condition, PluginReport, Registry

__all__ = ["Condition", "PluginReport", "Registry"]
