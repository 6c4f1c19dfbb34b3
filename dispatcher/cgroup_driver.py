"""Which cgroup driver this node uses. Detected once: the kubelet adopts what RuntimeConfig answers."""

from __future__ import annotations

from pathlib import Path

SYSTEMD_MARK = Path("/run/systemd/system")  # exists exactly when systemd is PID 1 (sd_booted(3))


def choose_cgroup_driver(configured: str, engine_drivers: tuple[str, ...], *, mark: Path = SYSTEMD_MARK) -> str:
    """Return "systemd" or "cgroupfs".

    Args:
        configured: what `dispatcher.yaml` says; "auto" leaves it to us.
        engine_drivers: what the loaded runtimes' engines use, "" where one has none of its own. An engine cannot
            follow another driver than its own, so the first that has one decides.
        mark: the folder whose existence means that systemd runs.
    """
    if configured != "auto":
        return configured
    for driver in engine_drivers:
        if driver:
            return driver
    return "systemd" if mark.is_dir() else "cgroupfs"
