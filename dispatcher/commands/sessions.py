"""What `run` and `play` share: making sessions from manifests, running them in the foreground, signals, cleaning up."""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import json
import os
import platform
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dispatcher.commands.connection import add_endpoint, connect, parse_info
from dispatcher.commands.output import Console, Exit, Failure
from dispatcher.commands.pod_folders import add_pods_dir, folder_of

if TYPE_CHECKING:
    from dispatcher.commands.pod_session import PodSession
    from dispatcher.cri.client import CriClient
    from dispatcher.manifest import Node, PodManifest


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that both commands take."""
    parser.add_argument("-d", "--detach", action="store_true", help="start, print the pod's id, and leave it running")
    parser.add_argument("--keep", action="store_true", help="do not remove the pod when it has ended; see `rm`")
    parser.add_argument("--rm", action="store_true", help="remove the pod when it has ended (this is the default)")
    parser.add_argument(
        "--pull",
        choices=("always", "missing", "never"),
        default="",
        help="when to pull images (default: as the manifest or the tag says)",
    )
    parser.add_argument(
        "--auth-file",
        metavar="FILE",
        help="registry credentials in the form of ~/.docker/config.json (default: none)",
    )
    parser.add_argument("--grace", metavar="SECONDS", type=int, help="time for containers to end when interrupted")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing beside the containers' output")
    add_pods_dir(parser)
    add_endpoint(parser)


async def run_pods(args: argparse.Namespace, console: Console, manifests: Sequence[PodManifest], runtime: str) -> int:
    """Run pods to their end in the foreground, or start them only with `--detach`. Returns the exit code.

    Args:
        args: the options of `add_session_options`.
        console: where progress is said.
        manifests: the pods.
        runtime: the runtime that the user asked for, "" for the policy's choice.
    """
    from dispatcher.commands.pod_session import first_failure

    if args.keep and args.rm:
        raise Failure("--keep and --rm exclude each other", code=Exit.USAGE)
    console.quiet = args.quiet
    auth_for = _read_auth(args.auth_file)
    try:
        async with connect(args) as client:
            await client.call("Version", timeout_s=10)
            handler = await choose_handler(client, runtime) if runtime else ""
            sessions = [
                _make_session(
                    client, manifest, args, console, handler=handler, auth_for=auth_for, many=len(manifests) > 1
                )
                for manifest in manifests
            ]
            if args.detach:
                for session in sessions:
                    await _launch(session, console)
                return Exit.OK
            codes = await asyncio.gather(*(_run_one(session, console, keep=args.keep) for session in sessions))
            return first_failure(codes)
    except Failure as failure:
        # What a container answers must be told from what the dispatcher could not do; a refusal is worth its own code.
        if failure.code not in (Exit.USAGE, Exit.UNREACHABLE, Exit.REFUSED):
            failure.code = Exit.NO_RESULT
        raise


async def choose_handler(client: CriClient, runtime: str) -> str:
    """Return a handler of the policy that leads to `runtime`. Policy decides on the pod all the same.

    Raises:
        Failure: the policy has no such handler.
    """
    reply = await client.call("Status", verbose=True)
    policy = parse_info(reply.info).get("policy")
    handlers = policy.get("handlers", {}) if isinstance(policy, dict) else {}
    for name, target in sorted(handlers.items()) if isinstance(handlers, dict) else ():
        if name and target == [runtime]:
            return str(name)
    known = sorted(handler.name for handler in reply.runtime_handlers if handler.name)
    raise Failure(
        f"no handler of the policy leads to the runtime {runtime!r}; it has {', '.join(known) or 'none'}",
        hint=f"add one to the policy file:  handlers: {{{runtime}: {runtime}}}",
        code=Exit.USAGE,
    )


def _make_session(
    client: CriClient,
    manifest: PodManifest,
    args: argparse.Namespace,
    console: Console,
    *,
    handler: str,
    auth_for: Callable[[str], Any],
    many: bool,
) -> PodSession:
    from dispatcher.commands.pod_session import PodSession, SessionOptions
    from dispatcher.manifest import Placement

    if handler:
        spec = manifest.spec.model_copy(update={"runtime_class_name": handler})
        manifest = type(manifest)(pod=manifest.pod.model_copy(update={"spec": spec}), objects=manifest.objects)
    uid = manifest.pod.metadata.uid or str(uuid.uuid4())
    folder = folder_of(args.pods_dir, uid)
    if folder is None:
        raise Failure(f"the uid {uid!r} cannot be the name of a folder", code=Exit.USAGE)
    return PodSession(
        client,
        manifest,
        placement=Placement(uid=uid, pod_dir=str(folder / "pod"), log_dir=str(folder / "logs")),
        node=read_node(),
        console=console,
        options=SessionOptions(
            pods_dir=args.pods_dir,
            pull=args.pull,
            grace_s=args.grace,
            prefix=many or len(manifest.containers) > 1,
            auth_for=auth_for,
        ),
    )


def read_node() -> Node:
    """Return what a kubelet on this node would know of it."""
    from dispatcher.manifest import Node, parse_resolv_conf

    resolv = ""
    with contextlib.suppress(OSError):
        resolv = Path("/etc/resolv.conf").read_text(encoding="utf-8", errors="replace")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Node(name=platform.node() or "localhost", dns=parse_resolv_conf(resolv), memory_bytes=memory)


async def _launch(session: PodSession, console: Console) -> None:
    try:
        await session.start()
        await session.launch()
    except BaseException:
        await _finish(session, console, keep=False)
        raise
    console.line(session.pod_id)


async def _run_one(session: PodSession, console: Console, *, keep: bool) -> int:
    """Run one pod, and clean up whatever happens."""
    try:
        async with _stop_on_signals(session, console):
            await session.start()
            return await session.run()
    finally:
        await _finish(session, console, keep=keep)


async def _finish(session: PodSession, console: Console, *, keep: bool) -> None:
    try:
        await (session.stop() if keep else session.remove())
    except Failure as failure:
        console.complain(
            Failure(f"cleaning up {session.name}: {failure.message}", hint="`dispatcher rm -f` tries again")
        )


@contextlib.asynccontextmanager
async def _stop_on_signals(session: PodSession, console: Console) -> AsyncIterator[None]:
    """The first SIGINT or SIGTERM asks the containers to end, the second one kills them, the third one gives up.

    Before the sandbox exists there is nothing to end, so a signal cancels.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    received = 0
    stopping: set[asyncio.Task[None]] = set()

    def on_signal() -> None:
        nonlocal received
        received += 1
        if not session.pod_id or received > 2:
            if task is not None:
                task.cancel()
            return
        console.say("stopping; once more kills" if received == 1 else "killing")
        stopping.add(asyncio.ensure_future(session.interrupt(now=received > 1)))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    except asyncio.CancelledError:
        if not received:
            raise
        if task is not None:
            task.uncancel()
        raise Failure("interrupted", code=Exit.INTERRUPTED) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        for stop in stopping:
            stop.cancel()


def _read_auth(path: str | None) -> Callable[[str], Any]:
    """Return a function from an image to its registry's credentials, read from a docker config file."""
    if path is None:
        return lambda _image: None
    try:
        auths = json.loads(Path(path).read_text(encoding="utf-8"))["auths"]
        parsed = {_registry_key(key): _credentials(key, entry) for key, entry in auths.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise Failure(
            f"{path} cannot be read as a docker config file: {type(error).__name__}",
            hint='it looks like {"auths": {"registry.example": {"auth": "BASE64 OF USER:PASSWORD"}}}',
            code=Exit.USAGE,
        ) from error

    def find(image: str) -> Any:
        host = image.partition("/")[0]
        registry = host if "/" in image and ("." in host or ":" in host or host == "localhost") else "docker.io"
        return parsed.get(registry)

    return find


def _registry_key(key: str) -> str:
    host = key.partition("://")[2] or key
    host = host.partition("/")[0]
    return "docker.io" if host == "index.docker.io" else host


def _credentials(key: str, entry: dict[str, Any]) -> dict[str, str]:
    found = {"server_address": key}
    if entry.get("identitytoken"):
        return {**found, "identity_token": entry["identitytoken"]}
    if entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        return {**found, "username": user, "password": password}
    return {**found, "username": entry["username"], "password": entry["password"]}
