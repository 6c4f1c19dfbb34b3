"""The process that looks inside images: `python -m dispatcher_images.worker`, one job per process.

It reads one JSON job from standard input, opens what the job names, gives up power (`confine`), does the job and
prints one JSON reply. It imports the standard library and zstandard only, so that it starts fast and holds little.
A job that is killed at any point leaves only files in the folder that its parent made for it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import IO, Any

import zstandard  # noqa: F401  # loaded before the root folder changes

from dispatcher_images import confine
from dispatcher_images.hostile import BadImage, Limits
from dispatcher_images.layers import Entries, LayerReader
from dispatcher_images.unpack import Unpacker

_CHUNK = 256 << 10


def main() -> int:
    """Run the job on standard input. Returns the exit code: 0 whenever a reply was printed."""
    job = json.loads(sys.stdin.buffer.read())
    try:
        reply = _JOBS[job["job"]](job)
    except BadImage as error:
        reply = {"error": "bad-image", "message": str(error)}
    except OSError as error:
        kind = "no-space" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "failed"
        reply = {"error": kind, "message": f"{error.strerror or error} ({type(error).__name__})"}
    except MemoryError:
        reply = {"error": "bad-image", "message": "the image needs more memory to read than is allowed"}
    sys.stdout.write(json.dumps(reply))
    sys.stdout.flush()
    return 0


def _limits(job: Mapping[str, Any]) -> Limits:
    known = {field.name for field in fields(Limits)}
    return Limits(**{name: value for name, value in job["limits"].items() if name in known})


@contextlib.contextmanager
def _opened(job: Mapping[str, Any]) -> Iterator[list[tuple[IO[bytes], str]]]:
    """The job's layers as (open blob, promised diff id), lowest first."""
    with contextlib.ExitStack() as stack:
        yield [(stack.enter_context(open(layer["path"], "rb")), layer["diff_id"]) for layer in job["layers"]]


def _check(found: str, promised: str) -> None:
    if found != promised:
        raise BadImage(f"a layer unpacks to {found}, but the image's config promises {promised}")


def verify(job: Mapping[str, Any]) -> dict[str, Any]:
    """Inflate layers and hold them against the digests that the image's config promises. Writes nothing."""
    limits = _limits(job)
    confine.die_with_parent(job["parent"])
    confine.limit_resources(limits)
    with _opened(job) as layers:
        confine.enter_root(job["empty"])
        confine.keep_capabilities(frozenset())
        total = 0
        for blob, promised in layers:
            reader = LayerReader(blob, limits)
            _check(reader.finish(), promised)
            total += reader.count
            if total > limits.max_bytes:
                raise BadImage(f"the image unpacks to more than {limits.max_bytes} bytes")
    return {"bytes": total}


def unpack(job: Mapping[str, Any]) -> dict[str, Any]:
    """Make the root file system in the empty folder `target`."""
    limits = _limits(job)
    confine.die_with_parent(job["parent"])
    confine.limit_resources(limits)
    with _opened(job) as layers:
        confine.enter_root(job["target"])
        confine.keep_capabilities(confine.UNPACK_CAPABILITIES)
        unpacker = Unpacker(limits)
        for blob, promised in layers:
            _check(unpacker.apply(blob), promised)
        blocks, inodes = _measure("/")
        confine.sync_file_system("/")
    return {
        "entries": unpacker.report.entries,
        "skipped": unpacker.report.skipped,
        "bytes": blocks,
        "inodes": inodes,
    }


def _measure(folder: str) -> tuple[int, int]:
    """Bytes on disk and inodes below a folder, hard links once."""
    total, inodes = 0, 1
    seen: set[int] = set()
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                    if status.st_ino in seen:
                        continue
                    seen.add(status.st_ino)
                total += status.st_blocks * 512
                inodes += 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return total, inodes


def archive(job: Mapping[str, Any]) -> dict[str, Any]:
    """Write a tar for `docker load` to the file `target`: config, inflated layers, manifest.json."""
    limits = _limits(job)
    confine.die_with_parent(job["parent"])
    confine.limit_resources(limits)
    with open(job["config"], "rb") as source:
        config = source.read(limits.max_header_bytes * 64)
    fd = os.open(job["target"], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as out, _opened(job) as layers:
        confine.enter_root(job["empty"])
        confine.keep_capabilities(frozenset())
        total = 0
        names: list[str] = []
        config_name = job["config_digest"].removeprefix("sha256:") + ".json"
        _add(out, config_name, config)
        for blob, promised in layers:
            name = promised.removeprefix("sha256:") + ".tar"
            if name not in names:
                total += _add_layer(out, name, blob, promised, limits)
                if total > limits.max_bytes:
                    raise BadImage(f"the image unpacks to more than {limits.max_bytes} bytes")
            names.append(name)
        manifest = [{"Config": config_name, "RepoTags": [job["repo_tag"]], "Layers": names}]
        _add(out, "manifest.json", json.dumps(manifest).encode())
        out.write(bytes(2 * tarfile.BLOCKSIZE))
    return {}


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def _pad(out: IO[bytes], size: int) -> None:
    out.write(bytes(-size % tarfile.BLOCKSIZE))


def _add(out: IO[bytes], name: str, content: bytes) -> None:
    out.write(_header(name, len(content)))
    out.write(content)
    _pad(out, len(content))


def _add_layer(out: IO[bytes], name: str, blob: IO[bytes], promised: str, limits: Limits) -> int:
    """Inflate one layer into the archive; its size is known only afterwards, so its header is written last."""
    reader = LayerReader(blob, limits)
    at = out.tell()
    out.write(bytes(tarfile.BLOCKSIZE))
    while data := reader.read(_CHUNK):
        out.write(data)
    _check(reader.finish(), promised)
    _pad(out, reader.count)
    end = out.tell()
    out.seek(at)
    out.write(_header(name, reader.count))
    out.seek(end)
    return reader.count


def accounts(job: Mapping[str, Any]) -> dict[str, Any]:
    """Find /etc/passwd and /etc/group by reading layers from the top, without unpacking anything.

    Replies `indirect` where they lie behind links: only the whole tree can tell what those lead to.
    """
    limits = _limits(job)
    confine.die_with_parent(job["parent"])
    confine.limit_resources(limits)
    with _opened(job) as layers:
        confine.enter_root(job["empty"])
        confine.keep_capabilities(frozenset())
        found: dict[str, bytes] = {}
        pending = {"etc/passwd", "etc/group"}
        try:
            for blob, promised in reversed(layers):
                here, gone = _find_accounts(blob, promised, pending, limits)
                found.update(here)
                pending -= here.keys() | gone
                if not pending:
                    break
        except _IndirectError:
            return {"indirect": True}
    return {name.removeprefix("etc/"): base64.b64encode(content).decode() for name, content in found.items()}


class _IndirectError(Exception):
    """An account file, or its folder, is a link."""


def _find_accounts(
    blob: IO[bytes], promised: str, wanted: set[str], limits: Limits
) -> tuple[dict[str, bytes], set[str]]:
    """Return what one layer holds of the wanted files, and which of them it hides in the layers below."""
    found: dict[str, bytes] = {}
    gone: set[str] = set()
    hiding = {".wh.etc": wanted, ".wh..wh..opq": wanted, "etc/.wh..wh..opq": wanted}
    reader = LayerReader(blob, limits)
    entries = Entries(reader, limits)
    for count, entry in enumerate(entries):
        if count > limits.max_entries:
            raise BadImage(f"the image holds more than {limits.max_entries} files")
        name = "/".join(part for part in entry.name.split("/") if part not in {"", "."})
        folder, _, base = name.rpartition("/")
        if name in hiding:
            gone |= hiding[name]
        elif folder == "etc" and f"etc/{base.removeprefix('.wh.')}" in wanted and base.startswith(".wh."):
            gone.add(f"etc/{base.removeprefix('.wh.')}")
        elif name == "etc" and not entry.isdir():
            raise _IndirectError
        elif name in wanted:
            if not entry.isreg() or entry.sparse is not None:
                raise _IndirectError
            found[name] = _account_file(entry, entries, limits)
    _check(reader.finish(), promised)
    return found, gone


def _account_file(entry: tarfile.TarInfo, entries: Entries, limits: Limits) -> bytes:
    if entry.size > limits.max_account_bytes:
        raise BadImage(f"the image's /{entry.name} is larger than {limits.max_account_bytes} bytes")
    content = io.BytesIO()
    for _, data in entries.data(entry):
        content.write(data)
    return content.getvalue()


def run_program(job: Mapping[str, Any]) -> dict[str, Any]:
    """Become a program that reads a tree made from an image, such as mkfs.erofs. Does not return."""
    limits = _limits(job)
    confine.die_with_parent(job["parent"])
    confine.limit_resources(limits)
    confine.keep_capabilities(frozenset({confine.DAC_OVERRIDE, confine.DAC_READ_SEARCH}))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.execv(job["program"], job["argv"])  # noqa: S606


_JOBS = {"verify": verify, "unpack": unpack, "archive": archive, "accounts": accounts, "program": run_program}

if __name__ == "__main__":
    sys.exit(main())
