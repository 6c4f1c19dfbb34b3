"""Which cgroup driver this node uses. Detected once: the kubelet adopts what RuntimeConfig answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from dispatcher.api import RuntimeHealth
from dispatcher.errors import RuntimeDown

SYSTEMD_MARK = Path("/run/systemd/system")  # exists exactly when systemd is PID 1 (sd_booted(3))


def choose_cgroup_driver(
    configured: str,
    health: Mapping[str, RuntimeHealth],
    required: Iterable[str],
    *,
    mark: Path = SYSTEMD_MARK,
) -> str:
    """Return "systemd" or "cgroupfs".

    Args:
        configured: what `dispatcher.yaml` says; "auto" leaves it to us.
        health: what each loaded runtime said last. An engine cannot follow another driver than its own, so the first
            that has one decides.
        required: the runtimes without which the node is not ready.
        mark: the folder whose existence means that systemd runs.

    Raises:
        RuntimeDown: a required runtime has not been met yet, so that its engine's driver is not known. A guess would
            stay with the kubelet until its next start.
    """
    if configured != "auto":
        return configured
    for state in health.values():
        if state.cgroup_driver:
            return state.cgroup_driver
    for name in required:
        if name in health and not health[name].ready:
            raise RuntimeDown(
                f'The cgroup driver is not known before the runtime "{name}" is ready; '
                "cgroup_driver in dispatcher.yaml says it without asking."
            )
    return "systemd" if mark.is_dir() else "cgroupfs"
