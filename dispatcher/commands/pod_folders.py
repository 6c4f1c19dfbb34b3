"""The folders that `run` and `play` make for pods, as a kubelet makes its own: volumes, termination logs, container logs.

    <pods dir>/<uid>/pod/...     volumes and termination logs
    <pods dir>/<uid>/logs/...    container logs

Only a uid that is plain letters, digits and dashes ever becomes part of a path.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path

from dispatcher.effects import effect

DEFAULT_PODS_DIR = "/var/lib/dispatcher-pods"
PODS_DIR_VARIABLE = "DISPATCHER_PODS_DIR"
_UID = re.compile(r"[0-9A-Za-z][-0-9A-Za-z]{0,63}")


def add_pods_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where these folders are."""
    parser.add_argument(
        "--pods-dir",
        metavar="DIR",
        default=os.environ.get(PODS_DIR_VARIABLE, DEFAULT_PODS_DIR),
        help=f"where volumes and logs of played pods live (default: ${PODS_DIR_VARIABLE}, else {DEFAULT_PODS_DIR})",
    )


def folder_of(pods_dir: str, uid: str) -> Path | None:
    """Return the folder of a pod, None for a uid that none of our pods can have."""
    return Path(pods_dir).absolute() / uid if _UID.fullmatch(uid) else None


@effect("commands.remove_folders")
def remove_folders(pods_dir: str, uid: str) -> None:
    """Remove the folders of a pod. Idempotent; does nothing for a pod that is not ours."""
    folder = folder_of(pods_dir, uid)
    if folder is not None and folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
