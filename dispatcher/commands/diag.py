"""Put what a support case needs into one archive, without secrets.

`diag dump` writes a tar.gz, readable by its owner only: the configuration, the policy, the network configurations, the
versions, the checks of `doctor`, facts on the host, and from the daemon its status with conditions, the records of pods
and containers, images, metrics, traces of starts, and the newest lines of its log. Without a daemon, the rest is still
written, and the command ends with 3; where another part is missing, with 1. What is missing is said, and stands in the archive's
manifest.json.

Values of variables, labels and annotations, words of commands, whatever stands under a key that sounds like a secret,
and credentials within texts are replaced by ***, also where they are written in base64 or in another form. Look at the
archive before you give it away all the same: names of pods, images, hosts and addresses are in it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dispatcher.commands.config_files import add_config
from dispatcher.commands.connection import add_endpoint, ask_topics, connect
from dispatcher.commands.output import Console, Exit, Failure

if TYPE_CHECKING:
    from dispatcher.observability.scrubber import Scrubber

EPILOG = """\
examples:
  dispatcher diag dump
  journalctl -u dispatcher -o cat --since -1h > dispatcher.log
  dispatcher diag dump --log dispatcher.log --file case-1234.tar.gz
"""

_MAX_PART = 8 << 20
_MAX_ALL = 48 << 20
_MAX_CNI_FILES = 32

_HOST_FILES = (
    "/etc/os-release",
    "/etc/debian_version",
    "/proc/version",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/cgroups",
    "/proc/filesystems",
    "/proc/modules",
    "/proc/pressure/cpu",
    "/proc/pressure/memory",
    "/proc/pressure/io",
    "/sys/fs/cgroup/cgroup.controllers",
    "/sys/fs/cgroup/cgroup.subtree_control",
    "/proc/sys/kernel/random/boot_id",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/kernel/pid_max",
    "/proc/sys/fs/inotify/max_user_instances",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    dump = actions.add_parser(
        "dump",
        help="write the archive",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dump.add_argument("-f", "--file", metavar="FILE", help="where to (default: dispatcher-diag-HOST-TIME.tar.gz here)")
    dump.add_argument("--log", metavar="FILE", action="append", default=[], help="take the end of this log in, too")
    add_config(dump)
    dump.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="form of what is told of the archive"
    )
    add_endpoint(dump)
    dump.set_defaults(execute=execute)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    host = re.sub(r"[^A-Za-z0-9.-]", "_", platform.node())[:64] or "node"
    path = Path(args.file or f"dispatcher-diag-{host}-{now}.tar.gz")
    from dispatcher.observability.scrubber import Scrubber

    gathered = Gathered()
    unreachable = await _gather_from_daemon(args, gathered)
    _gather_here(args, gathered)
    scrubber = Scrubber()
    for document in gathered.documents.values():
        scrubber.learn_from(document)
    gathered.learn(scrubber)
    told = write_archive(path, gathered, scrubber)
    if console.as_json:
        console.data({"file": str(path), **told})
    else:
        console.line(str(path))
    for name, why in gathered.missing.items():
        console.say(f"missing: {name}: {scrubber.text(why)}")
    if unreachable:
        return Exit.UNREACHABLE
    return Exit.FAILED if gathered.missing else Exit.OK


@dataclass(slots=True)
class Gathered:
    """What was found, before secrets are removed. It is in memory only."""

    documents: dict[str, Any] = field(default_factory=dict)  # become NAME.json
    texts: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    told: list[tuple[str, str, str]] = field(default_factory=list)  # what users wrote: (kind, name, value)

    def learn(self, scrubber: Scrubber) -> None:
        """Tell the scrubber what users wrote."""
        for kind, name, value in self.told:
            if kind == "variable":
                scrubber.learn_variable(name, value)
            else:
                scrubber.learn_from({name: value})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Whatever goes wrong with one part is noted, and the others go on."""
        try:
            yield
        except Failure as failure:
            self.missing[name] = failure.message
        except Exception as error:  # noqa: BLE001 - an archive with a gap is better than none
            self.missing[name] = f"{type(error).__name__}: {error}"


async def _gather_from_daemon(args: argparse.Namespace, gathered: Gathered) -> bool:
    """Ask the daemon; returns whether it cannot be reached."""
    from dispatcher.commands.status import ask

    try:
        async with connect(args) as client:
            # First of all: without it, nothing else of the daemon may be shown.
            secrets = json.loads((await ask_topics(client, "secrets"))["secrets"])
            gathered.told = [(str(kind), str(name), str(value)) for kind, name, value in secrets["told"]]
            if secrets["left_out"]:
                gathered.missing["secrets"] = f"{secrets['left_out']} values of users were too many to look for"
            with gathered.part("daemon/status"):
                gathered.documents["daemon/status"] = await ask(client)
            for topic in ("records", "traces"):
                with gathered.part(f"daemon/{topic}"):
                    gathered.documents[f"daemon/{topic}"] = json.loads((await ask_topics(client, topic))[topic])
            for topic in ("logs", "metrics"):
                with gathered.part(f"daemon/{topic}"):
                    gathered.texts[f"daemon/{topic}.txt"] = (await ask_topics(client, topic))[topic]
            with gathered.part("daemon/images"):
                images = (await client.call("ListImages")).images
                gathered.documents["daemon/images"] = [
                    {
                        "id": image.id,
                        "tags": list(image.repo_tags),
                        "digests": list(image.repo_digests),
                        "size_bytes": image.size,
                        "pinned": image.pinned,
                    }
                    for image in images
                ]
    except Failure as failure:
        gathered.missing["daemon"] = failure.message
        return failure.code == Exit.UNREACHABLE
    return False


def _gather_here(args: argparse.Namespace, gathered: Gathered) -> None:
    """Read what needs no daemon."""
    from dispatcher.commands.config_files import load
    from dispatcher.commands.doctor_checks import Node, run_checks

    with gathered.part("doctor"):
        gathered.documents["doctor"] = [
            {"check": item.check, "grade": item.grade, "message": item.message, "mend": item.mend}
            for item in run_checks(Node(), args.config)
        ]
    with gathered.part("versions"):
        gathered.documents["versions"] = _versions()
    with gathered.part("host"):
        gathered.documents["host"] = _host()
    with gathered.part("config"):
        loaded = load(args.config)
        gathered.documents["config/dispatcher"] = loaded.config.model_dump(mode="json")
        with gathered.part("config/policy"):
            gathered.texts["config/policy.yaml"] = _end_of(loaded.config.policy)
        folders = loaded.config.plugins.section("cni").get("conf_dirs") or ["/etc/cni/net.d"]
        files = [path for folder in folders for path in sorted(Path(str(folder)).glob("*.conf*"))]
        for number, path in enumerate(files[:_MAX_CNI_FILES]):
            name = f"config/cni/{number:02d}-{re.sub(r'[^A-Za-z0-9._-]', '_', path.stem)[:64]}"
            with gathered.part(name):
                gathered.documents[name] = json.loads(_end_of(path))
    for number, path in enumerate(args.log):
        with gathered.part(f"logs/{number}"):
            gathered.texts[f"logs/{number:02d}.txt"] = _end_of(Path(path))


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - _MAX_PART))
        return file.read(_MAX_PART).decode("utf-8", "replace")


def _versions() -> dict[str, Any]:
    from importlib import metadata

    from dispatcher.api import API_VERSION
    from dispatcher.version import program_version

    return {
        "client": program_version(),
        "plugin_api": list(API_VERSION),
        "python": platform.python_version(),
        "system": platform.platform(),
        "distributions": dict(sorted((item.name, item.version) for item in metadata.distributions())),
    }


def _host() -> dict[str, Any]:
    found: dict[str, Any] = {"uname": list(platform.uname()), "cpus": os.cpu_count()}
    for name in _HOST_FILES:
        with contextlib.suppress(OSError), open(name, "rb") as file:
            found[name] = file.read(64 * 1024).decode("utf-8", "replace").splitlines()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        found["/proc/cpuinfo"] = file.read(64 * 1024).decode("utf-8", "replace").partition("\n\n")[0].splitlines()
    found["devices"] = {
        name: os.path.exists(name) for name in ("/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/vhost-vsock")
    }
    for name in ("/", "/var/lib", "/run"):
        with contextlib.suppress(OSError):
            usage = os.statvfs(name)
            found[f"space {name}"] = {
                "bytes": usage.f_frsize * usage.f_blocks,
                "free_bytes": usage.f_frsize * usage.f_bavail,
                "inodes": usage.f_files,
                "free_inodes": usage.f_favail,
            }
    return found


def write_archive(path: Path, gathered: Gathered, scrubber: Scrubber) -> dict[str, Any]:
    """Write everything without secrets, and return the manifest. The file appears whole or not at all.

    Raises:
        Failure: it exists already, or cannot be written.
    """
    documents = {f"{name}.json": partial(_render, document, scrubber) for name, document in gathered.documents.items()}
    parts = documents | {name: partial(scrubber.text, text) for name, text in gathered.texts.items()}
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Failure(f"{path} cannot be made: {error.strerror}", hint="name another file with -f") from error
    try:
        with os.fdopen(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
            manifest = _write_parts(archive, parts, gathered.missing, scrubber)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Failure(f"{path} cannot be written: {error.strerror}") from error
        raise
    return manifest


def _render(document: Any, scrubber: Scrubber) -> str:
    return json.dumps(scrubber.value(document), indent=1, ensure_ascii=False)


def _write_parts(
    archive: tarfile.TarFile, parts: Mapping[str, Callable[[], str]], missing: dict[str, str], scrubber: Scrubber
) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    cut: list[str] = []
    left = _MAX_ALL
    for name, make in sorted(parts.items()):
        content = make().encode("utf-8", "replace")
        limit = min(_MAX_PART, left)
        if len(content) > limit:
            cut.append(name)
            content = content[len(content) - limit :]  # the end is the newest part
        left -= len(content)
        sizes[name] = len(content)
        _add(archive, name, content)
    manifest = {
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parts": sizes,
        "cut_to_their_end": cut,
        "missing": {name: scrubber.text(why) for name, why in missing.items()},
    }
    _add(archive, "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(f"dispatcher-diag/{name}")
    entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
    archive.addfile(entry, io.BytesIO(content))
