"""Calling one plugin: finding its executable, giving it what it needs, reading how it ended."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from dispatcher.api import Observe
from dispatcher_cni.config import CniConfig
from dispatcher_cni.errors import PluginFailed, PluginMissing
from dispatcher_cni.exec import PluginHung, PluginOutput, PluginOverflow, run_plugin
from dispatcher_cni.plan import AttachmentPlan
from dispatcher_cni.request import make_environment, make_version_input
from dispatcher_cni.result import PluginError, parse_error, parse_versions
from dispatcher_cni.versions import NEWEST, OLDEST, at_least

_Stamp = tuple[int, int, int]


class PluginRunner:
    """Runs plugins with the settings of this node, and measures them. Remembers which versions an executable speaks."""

    def __init__(self, config: CniConfig, observe: Observe) -> None:
        self._config = config
        self._observe = observe
        self._bin_dirs = tuple(str(folder) for folder in config.bin_dirs)
        self._versions: dict[Path, tuple[_Stamp, tuple[str, ...]]] = {}

    @property
    def bin_dirs(self) -> tuple[str, ...]:
        """The folders in which plugins are looked for now."""
        return self._bin_dirs

    def find(self, name: str, bin_dirs: Sequence[str] = ()) -> Path:
        """Find an executable: first where the plan says that it was, then where this node has them now.

        Raises:
            PluginMissing: nowhere.
        """
        folders = self._folders(bin_dirs)
        for folder in folders:
            path = Path(folder, name)
            if path.is_file() and os.access(path, os.X_OK):
                return path
        raise PluginMissing(name, folders)

    def _folders(self, bin_dirs: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*bin_dirs, *self._bin_dirs)))

    async def call(
        self,
        command: str,
        name: str,
        *,
        stdin: bytes,
        plan: AttachmentPlan | None = None,
        netns_path: str | None = None,
        inherited_fd: int | None = None,
    ) -> bytes:
        """Run a plugin and return what it printed. `netns_path` overrides the plan's.

        Raises:
            PluginMissing: it is not there.
            PluginFailed: it failed, hung or printed without end.
        """
        bin_dirs = plan.bin_dirs if plan is not None else ()
        path = self.find(name, bin_dirs)
        environment = {"PATH": self._config.path, **self._config.environment}
        environment |= make_environment(command, bin_dirs=self._folders(bin_dirs), plan=plan, netns_path=netns_path)
        output = await self._run(command, path, stdin, environment, inherited_fd=inherited_fd)
        if output.exit_code != 0:
            raise PluginFailed(name, command, parse_error(output.exit_code, output.stdout, output.stderr))
        return output.stdout

    async def _run(
        self, command: str, path: Path, stdin: bytes, environment: dict[str, str], *, inherited_fd: int | None = None
    ) -> PluginOutput:
        timeout_s = self._config.plugin_timeout_s
        began, outcome = time.monotonic(), "failed"
        try:
            output = await run_plugin(
                path, stdin=stdin, environment=environment, timeout_s=timeout_s, inherited_fd=inherited_fd
            )
            outcome = "ok" if output.exit_code == 0 else "failed"
            return output
        except PluginHung as error:
            text = f"it did not end within {timeout_s:g} s and was killed with its children"
            raise PluginFailed(path.name, command, PluginError(code=0, text=text)) from error
        except PluginOverflow as error:
            text = "it printed more than any answer holds and was killed"
            raise PluginFailed(path.name, command, PluginError(code=0, text=text)) from error
        except OSError as error:
            text = f"{path} cannot be started ({error.strerror})"
            raise PluginFailed(path.name, command, PluginError(code=0, text=text)) from error
        finally:
            labels = {"plugin": path.name, "command": command, "outcome": outcome}
            self._observe("cni.step", time.monotonic() - began, labels)

    async def versions(self, name: str, bin_dirs: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the specification versions that a plugin speaks, oldest first; asked once per executable file.

        Raises:
            PluginMissing: it is not there.
            PluginFailed: it hung or cannot be started.
        """
        path = self.find(name, bin_dirs)
        status = path.stat()
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        known = self._versions.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        environment = {"PATH": self._config.path, **self._config.environment}
        environment |= make_environment("VERSION", bin_dirs=self._bin_dirs)
        # These are asked for only by the oldest plugins, which know no VERSION but check their variables first.
        environment |= {"CNI_CONTAINERID": "dummy", "CNI_NETNS": "dummy", "CNI_IFNAME": "dummy"}
        output = await self._run("VERSION", path, make_version_input(NEWEST), environment)
        try:
            found = parse_versions(output.stdout) if output.exit_code == 0 else (OLDEST,)
        except ValueError:
            found = (OLDEST,)
        self._versions[path] = stamp, found
        return found

    async def speaks(self, name: str, version: str, bin_dirs: Sequence[str] = ()) -> bool:
        """Tell whether a plugin speaks `version` or a newer one."""
        return any(at_least(other, version) for other in await self.versions(name, bin_dirs))
