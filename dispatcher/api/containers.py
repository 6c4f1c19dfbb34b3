"""What every runtime has to read from a container in the same way: its command, environment, user, profiles, names.

Each function takes what the core hands to a runtime and returns plain values, or refuses with the sentence that the
caller of CreateContainer gets. Nothing here knows an engine; what an engine cannot carry is refused by its plugin.
Image and container are written by users: whatever leaves here is checked for its form, and stays data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dispatcher.api.providers import ImageProvider
from dispatcher.api.runtimes import ContainerRef
from dispatcher.errors import InvalidRequest
from dispatcher.model import Capabilities, ContainerUser, EnvVar, ProfileType

POD_FILES = ("resolv.conf", "hosts", "hostname")

_MAX_PROFILE = 1 << 20
_CAPABILITY = re.compile(r"[A-Z][A-Z_]{1,40}")
_ENV_KEY = re.compile(r"[^=\x00]+")


def check_command(container: ContainerRef) -> None:
    """Refuse a container for which neither the request nor the image names a command."""
    spec, image = container.spec, container.image
    if not (spec.command or spec.args or image.entrypoint or image.cmd):
        raise InvalidRequest("no command specified: neither the container nor its image names one")


def command_line(container: ContainerRef) -> tuple[str, ...]:
    """The arguments of the first process, as Kubernetes merges them: `command` replaces the image's entrypoint and its
    cmd, `args` alone replaces the cmd only. Raises InvalidRequest where nothing is left.
    """
    check_command(container)
    spec, image = container.spec, container.image
    if spec.command:
        return (*spec.command, *spec.args)
    return (*image.entrypoint, *(spec.args or image.cmd))


def environment(container: ContainerRef) -> tuple[EnvVar, ...]:
    """The request's variables, in order; the image's are not among them. Raises InvalidRequest for one that cannot be."""
    for variable in container.spec.envs:
        if not _ENV_KEY.fullmatch(variable.key):
            raise InvalidRequest(f"environment variable name {variable.key!r} is empty or holds '='")
        if b"\0" in variable.value:
            raise InvalidRequest(f"environment variable {variable.key} holds a zero byte")
    return container.spec.envs


def stop_signal(container: ContainerRef) -> str:
    """The signal that asks the container to end: its own, else its image's, else SIGTERM.

    Returns a number or a name with SIG. An image is written by anybody, so what it names must look like a signal.
    """
    for wanted in (container.spec.stop_signal, container.image.stop_signal):
        name = wanted.upper()
        if re.fullmatch(r"[1-9][0-9]?", name) and int(name) <= 64:
            return name
        if re.fullmatch(r"(SIG)?[A-Z][A-Z0-9]{1,9}([+-][0-9]{1,2})?", name):
            return name if name.startswith("SIG") else f"SIG{name}"
    return "SIGTERM"


def capability_names(wanted: Capabilities) -> Capabilities:
    """The same capabilities in capitals, without CAP_. Raises InvalidRequest for what is no name of one."""

    def cleaned(names: tuple[str, ...]) -> tuple[str, ...]:
        upper = tuple(name.upper().removeprefix("CAP_") for name in names)
        for name in upper:
            if not _CAPABILITY.fullmatch(name):
                raise InvalidRequest(f"{name!r} is not the name of a capability")
        return upper

    return Capabilities(add=cleaned(wanted.add), drop=cleaned(wanted.drop), add_ambient=cleaned(wanted.add_ambient))


def checked_paths(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Masked or read-only paths. Raises InvalidRequest for one that is relative or climbs."""
    for path in paths:
        if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise InvalidRequest(f"masked or read-only path {path!r} is not an absolute path without '..'")
    return paths


def pod_files(container: ContainerRef) -> dict[str, str]:
    """The files that the core wrote for the pod, host path by their path in the container."""
    if not container.pod.state_dir:
        return {}
    files = {f"/etc/{name}": os.path.join(container.pod.state_dir, name) for name in POD_FILES}
    return {target: source for target, source in files.items() if os.path.exists(source)}


async def first_user(container: ContainerRef, images: ImageProvider) -> ContainerUser:
    """Who the first process is: the request's ids or name, else the image's user. Raises InvalidRequest."""
    security = container.spec.security
    if security.run_as_group is not None and security.run_as_user is None and not security.run_as_username:
        raise InvalidRequest("run_as_group is set without run_as_user or run_as_username")
    return await images.resolve_user(
        container.image_id,
        user=security.run_as_username or container.image.user,
        uid=security.run_as_user,
        gid=security.run_as_group,
        supplemental_groups=security.supplemental_groups,
        policy=security.groups_policy,
    )


def read_seccomp_profile(container: ContainerRef) -> Mapping[str, Any] | None:
    """The localhost profile that the container asks for, parsed; None where it asks for none. Blocks on a file.

    Raises:
        InvalidRequest: it is no absolute path of a regular file with a JSON object of at most 1 MiB.
    """
    profile = container.spec.security.seccomp
    if profile is None or profile.type is not ProfileType.LOCALHOST or container.spec.security.privileged:
        return None
    path = profile.localhost_ref
    if not os.path.isabs(path):
        raise InvalidRequest(f"seccomp profile {path!r} is not an absolute path")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not Path(f"/proc/self/fd/{fd}").is_file():
                raise InvalidRequest(f"seccomp profile {path} is not a regular file")
            text = file.read(_MAX_PROFILE + 1)
    except OSError as error:
        raise InvalidRequest(f"seccomp profile {path} cannot be read: {error.strerror}") from error
    if len(text) > _MAX_PROFILE:
        raise InvalidRequest(f"seccomp profile {path} is larger than {_MAX_PROFILE} bytes")
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"seccomp profile {path} is not JSON") from error
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"seccomp profile {path} is not a JSON object")
    return parsed
