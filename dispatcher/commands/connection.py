"""How commands reach the daemon, and how they find the pod or container that a user means."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dispatcher.commands.output import Exit, Failure, short_id

if TYPE_CHECKING:
    from dispatcher.cri.client import CallFailed, CriClient

DEFAULT_ENDPOINT = "unix:///run/dispatcher/cri.sock"
ENDPOINT_VARIABLE = "DISPATCHER_ENDPOINT"

_CODES = {
    "NOT_FOUND": Exit.NOT_FOUND,
    "PERMISSION_DENIED": Exit.REFUSED,
    "UNAVAILABLE": Exit.UNREACHABLE,
    "INVALID_ARGUMENT": Exit.FAILED,
}
_HINTS = {
    "PERMISSION_DENIED": "the policy file decides this: `dispatcher explain` shows why, `dispatcher status` which file",
    "UNIMPLEMENTED": "the daemon does not serve this call; `dispatcher version` shows its version",
    "DEADLINE_EXCEEDED": "the daemon still works on it; ask again, and look at its log",
    "INTERNAL": "the daemon's log holds the details under this correlation id",
}


def add_endpoint(parser: argparse.ArgumentParser, *, with_timeout: bool = True) -> None:
    """Add the options that every command with a daemon takes; `with_timeout` is off where it means something else."""
    parser.add_argument(
        "-e",
        "--endpoint",
        metavar="SOCKET",
        default=os.environ.get(ENDPOINT_VARIABLE, DEFAULT_ENDPOINT),
        help=f"the daemon's socket (default: ${ENDPOINT_VARIABLE}, else {DEFAULT_ENDPOINT})",
    )
    if not with_timeout:
        return
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive_seconds,
        default=120.0,
        help="give up on a call after this time (default: 120)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `-o`."""
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the output")


def positive_seconds(text: str) -> float:
    """Parse an option that is a time above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above zero")
    return value


@contextlib.asynccontextmanager
async def connect(args: argparse.Namespace) -> AsyncIterator[CriClient]:
    """Connect to the daemon that the options name. Errors of calls leave as `Failure`."""
    from dispatcher.cri.client import CallFailed, CriClient

    try:
        client = CriClient(args.endpoint, timeout_s=args.timeout)
    except ValueError as error:
        raise Failure(str(error), code=Exit.USAGE) from error
    async with client:
        reason = client.endpoint.why_unreachable()
        if reason:
            raise Failure(
                reason,
                hint="start it with `dispatcher serve` or `systemctl start dispatcher`, or name its socket with -e",
                code=Exit.UNREACHABLE,
            )
        try:
            yield client
        except CallFailed as error:
            raise as_failure(error) from error


def as_failure(error: CallFailed) -> Failure:
    """Turn an answer of the daemon into what the user reads."""
    return Failure(
        f"{error.rpc}: {error.message}", hint=_HINTS.get(error.code, ""), code=_CODES.get(error.code, Exit.FAILED)
    )


def parse_info(info: Mapping[str, str]) -> dict[str, Any]:
    """Parse the verbose values that are JSON; others stay text."""
    parsed: dict[str, Any] = {}
    for key, value in info.items():
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed


async def ask_topics(client: CriClient, *topics: str) -> dict[str, str]:
    """Return texts that the daemon keeps beyond CRI, by topic. Raises Failure where another CRI runtime answers."""
    from dispatcher.cri.handlers.topics import TOPIC_KEY

    reply = await client.call("Status", metadata=tuple((TOPIC_KEY, topic) for topic in topics))
    missing = [topic for topic in topics if topic not in reply.info]
    if missing:
        raise Failure(f"this daemon does not tell its {missing[0]}", hint="is it another CRI runtime? see -e")
    return dict(reply.info)


def pod_name(metadata: Any) -> str:
    """Return "namespace/name" of a sandbox's metadata."""
    return f"{metadata.namespace}/{metadata.name}"


async def list_pods(client: CriClient) -> Sequence[Any]:
    """Return all sandboxes, the newest first."""
    reply = await client.call("ListPodSandbox")
    return sorted(reply.items, key=lambda pod: pod.created_at, reverse=True)


async def list_containers(client: CriClient) -> Sequence[Any]:
    """Return all containers, the newest first."""
    reply = await client.call("ListContainers")
    return sorted(reply.containers, key=lambda container: container.created_at, reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What a word of the user stands for: one pod or one container."""

    pod: Any = None
    container: Any = None


def _choose(word: str, kind: str, found: Sequence[tuple[str, str]]) -> None:
    if len(found) > 1:
        candidates = "\n".join(f"{short_id(identifier)}  {name}" for identifier, name in found[:10])
        raise Failure(f"{word!r} names {len(found)} {kind}:\n{candidates}", hint="write more digits of the id")


def match_pod(word: str, pods: Sequence[Any]) -> Any | None:
    """Find the pod that `word` names: an id or its beginning, "namespace/name", or a name.

    Of several attempts of one pod the newest is meant. Raises Failure where the word names several pods.
    """
    by_name = [pod for pod in pods if word in (pod.metadata.name, pod_name(pod.metadata))]
    uids = {pod.metadata.uid for pod in by_name}
    if len(uids) > 1:
        _choose(word, "pods", [(pod.id, pod_name(pod.metadata)) for pod in by_name])
    if by_name:
        return max(by_name, key=lambda pod: (pod.metadata.attempt, pod.created_at))
    by_id = [pod for pod in pods if pod.id.startswith(word)] if _is_hex(word) else []
    _choose(word, "pods", [(pod.id, pod_name(pod.metadata)) for pod in by_id])
    return by_id[0] if by_id else None


def match_container(word: str, containers: Sequence[Any]) -> Any | None:
    """Find the container that `word` names: an id or its beginning. Raises Failure where it names several."""
    by_id = [item for item in containers if item.id.startswith(word)] if _is_hex(word) else []
    _choose(word, "containers", [(item.id, item.metadata.name) for item in by_id])
    return by_id[0] if by_id else None


def _is_hex(word: str) -> bool:
    return bool(word) and all(char in "0123456789abcdef" for char in word)


async def find_pod(client: CriClient, word: str) -> Any:
    """Return the pod that `word` names. Raises Failure (exit code 4) when there is none."""
    pod = match_pod(word, await list_pods(client))
    if pod is None:
        raise Failure(f"no pod {word!r}", hint="`dispatcher ps` lists them", code=Exit.NOT_FOUND)
    return pod


async def find_named(client: CriClient, word: str) -> Named:
    """Return the pod or the container that `word` names; a pod's name wins over a container's id."""
    pods, containers = await asyncio.gather(list_pods(client), list_containers(client))
    pod, container = match_pod(word, pods), match_container(word, containers)
    if pod is not None and container is not None and word not in (pod.metadata.name, pod_name(pod.metadata)):
        raise Failure(f"{word!r} is the beginning of a pod's and of a container's id", hint="write more digits")
    if pod is not None:
        return Named(pod=pod)
    if container is not None:
        return Named(container=container)
    raise Failure(f"no pod or container {word!r}", hint="`dispatcher ps -c` lists them", code=Exit.NOT_FOUND)


async def find_container(client: CriClient, word: str, name: str = "", *, running: bool = False) -> Any:
    """Return the container that is meant by an id, or by a pod and (where it has several) a container's name.

    Args:
        client: the connection.
        word: what `match_container` or `match_pod` understands.
        name: the container's name within the pod, "" for the pod's only one.
        running: look at running containers only.
    """
    named = await find_named(client, word)
    if named.container is not None:
        return named.container
    newest: dict[str, Any] = {}
    for container in await list_containers(client):
        if container.pod_sandbox_id == named.pod.id and container.metadata.name not in newest:
            newest[container.metadata.name] = container
    if running:
        newest = {key: container for key, container in newest.items() if container.state == 1}
    shown = pod_name(named.pod.metadata)
    if name:
        if name not in newest:
            raise Failure(f"pod {shown} has no container {name!r}", hint=_names(newest), code=Exit.NOT_FOUND)
        return newest[name]
    if not newest:
        raise Failure(f"pod {shown} has no {'running ' if running else ''}container", code=Exit.NOT_FOUND)
    if len(newest) > 1:
        raise Failure(f"pod {shown} has several containers", hint=f"choose one with -c: {_names(newest)}")
    return next(iter(newest.values()))


def _names(containers: Mapping[str, Any]) -> str:
    return "it has " + (", ".join(sorted(containers)) or "none")
