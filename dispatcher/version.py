"""The version of the installed distribution."""

from __future__ import annotations

import functools
from importlib import metadata


@functools.cache  # reads the installed distribution's files, and clients ask for the version all the time
def program_version() -> str:
    """Return it, or "0.0.0" when run from a source tree that was never installed: the kubelet parses it as semver."""
    try:
        return metadata.version("cri-dispatcher")
    except metadata.PackageNotFoundError:
        return "0.0.0"
