"""The policy as a daemon with this configuration would load it, without a daemon: plugins are loaded, nothing is started.

Plugins' folders are made in a temporary place, so that nothing of a running daemon is touched.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dispatcher.config import LoadedConfig
    from dispatcher.policy import Loaded
    from dispatcher.registry import Registry
    from dispatcher.yaml_marks import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """Loaded plugins, and the names of those with routing hooks."""

    registry: Registry
    hook_plugins: tuple[str, ...]

    def load_policy(self, path: Path) -> Loaded:
        """Load a policy file against the loaded runtimes. Raises YamlError with all that is wrong."""
        from dispatcher.policy import RuntimeTraits, load_policy
        from dispatcher.yaml_marks import Problem, YamlError

        try:
            text = path.read_bytes()
        except OSError as error:
            raise YamlError([Problem(str(path), 1, 1, f"cannot be read: {error.strerror}")]) from error
        traits = {
            runtime.name: RuntimeTraits(isolation=runtime.isolation, option_keys=runtime.option_keys)
            for runtime in self.registry.runtimes()
        }
        return load_policy(text, str(path), traits, plugins=self.hook_plugins)


@contextlib.contextmanager
def load_offline(loaded: LoadedConfig) -> Iterator[Offline]:
    """Load the enabled plugins. What one of them says of its failure goes to `config check` and `plugins`."""
    from dispatcher.registry import Registry

    with tempfile.TemporaryDirectory(prefix="dispatcher-check-") as folder:
        config = loaded.config.model_copy(update={"state_dir": Path(folder, "state"), "run_dir": Path(folder, "run")})
        registry = Registry.load(config, node_uuid="00000000-0000-4000-8000-000000000000")
        hooks = tuple(report["name"] for report in registry.report() if report["hooks"])
        yield Offline(registry=registry, hook_plugins=hooks)


def check_policy(loaded: LoadedConfig, path: Path) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Return (errors, warnings) of a policy file, its own tests included."""
    from dispatcher.yaml_marks import YamlError

    with load_offline(loaded) as offline:
        try:
            return (), offline.load_policy(path).warnings
        except YamlError as error:
            return error.problems, ()
