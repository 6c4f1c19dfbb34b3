"""The small parts of the Docker runtime that decide something."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dispatcher.api import parse_membership
from dispatcher.errors import InvalidRequest, NotFound, NotSupported, RuntimeDown, WrongState
from dispatcher.model import HugepageLimit, ImageId
from dispatcher_docker_shim import cgroups, config, errors, naming, pause_image, traits
from dispatcher_docker_shim.engine_stream import HijackedStream, demultiplex


def test_import_costs_no_engine_library() -> None:
    """Loading the plugin imports neither the SDK nor what it stands on."""
    script = (
        "import sys, dispatcher_docker_shim.plugin; sys.exit(any(m in sys.modules for m in ('docker', 'requests')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (404, NotFound),
        (409, WrongState),
        (500, WrongState),
        (501, NotSupported),
        (503, RuntimeDown),
    ],
)
def test_errors_by_http_code(status: int, kind: type[Exception]) -> None:
    """The code decides, the engine's words are kept on one line."""
    error = errors.from_status(status, "said\n this", doing="create a container")
    assert isinstance(error, kind)
    assert error.message == "Docker Engine could not create a container: said this"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"sockt": "/x"}, "sockt"),
        ({"socket": "relative"}, "socket"),
        ({"log_driver": "journald"}, "log_driver"),
        ({"rlimits": {"nofiles": [1, 2]}}, "nofiles"),
        ({"rlimits": {"nofile": [3, 2]}}, "soft"),
        ({"compilers": ["gcc; rm -rf /"]}, "compilers"),
    ],
)
def test_bad_sections_are_named(section: dict[str, object], words: str) -> None:
    """An unknown key or a bad value is an error that names it."""
    with pytest.raises(ValueError, match=words):
        config.parse(section)


def test_traits_of_engines() -> None:
    """Abilities are read from the engine's own words, old and new."""
    old = traits.from_engine({"SecurityOptions": ["name=seccomp,profile=default"], "CgroupVersion": "1"}, (1, 41))
    assert (old.seccomp, old.apparmor, old.cgroup_version, old.cdi, old.recursive_read_only) == (
        *(True, False, 1),
        *(False, False),
    )
    features = json.dumps({"mountOptions": ["ro", "rro"]})
    new = traits.from_engine(
        {
            "SecurityOptions": ["name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"],
            "CgroupVersion": "2",
            "CgroupDriver": "systemd",
            "CDISpecDirs": ["/etc/cdi"],
            "DefaultRuntime": "runc",
            "Runtimes": {"runc": {"status": {"org.opencontainers.runtime-spec.features": features}}},
            "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
        },
        (1, 48),
    )
    assert (new.apparmor, new.cdi, new.recursive_read_only, new.containerd_images) == (True, True, True, True)
    assert not traits.from_engine({"CDISpecDirs": ["/etc/cdi"]}, (1, 43)).cdi


def test_image_tag_is_a_reference_of_this_node() -> None:
    """The copy's name holds the node and the image's id, and nothing of the user's."""
    image = ImageId("sha256:" + "ab" * 32)
    assert naming.image_tag("r.local", "12345678-9ABC-def0", image) == f"r.local/123456789abc:{'ab' * 32}"


def test_pause_image_is_a_function_of_its_binary() -> None:
    """The same binary gives the same bytes, and the manifest holds together."""
    made = pause_image.image_tar(b"binary", "r/pause:1", "amd64")
    assert (
        made
        == pause_image.image_tar(b"binary", "r/pause:1", "amd64")
        != pause_image.image_tar(b"x", "r/pause:1", "amd64")
    )
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    entry = json.loads(content["manifest.json"])[0]
    layer = content[entry["Layers"][0]]
    assert json.loads(content[entry["Config"]])["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert {member.name: member.mode for member in tar} == {"netns": 0o444, "pause": 0o555}


def frame(number: int, data: bytes) -> bytes:
    return bytes([number, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


async def demultiplexed(wire: bytes, size: int, *, tty: bool = False) -> dict[str, bytes]:
    reader = asyncio.StreamReader()
    for start in range(0, len(wire), size):
        reader.feed_data(wire[start : start + size])
    reader.feed_eof()
    found = {"stdout": b"", "stderr": b""}
    stream = HijackedStream(reader, None, b"")  # type: ignore[arg-type]
    async for name, data in demultiplex(stream, tty=tty):
        found[name] += data
    return found


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
async def test_frames_at_any_cut(size: int) -> None:
    """Both outputs are whole however the bytes arrive, also when the last frame is cut off."""
    wire = frame(1, b"one") + frame(2, b"") + frame(2, b"two") + frame(1, b"x" * 500) + frame(1, b"cut off")[:-3]
    assert await demultiplexed(wire, size) == {"stdout": b"one" + b"x" * 500 + b"cut ", "stderr": b"two"}
    assert (await demultiplexed(wire, size, tty=True))["stdout"] == wire


async def test_broken_frames_are_the_engines_fault() -> None:
    """A frame of an unknown stream is not passed on as data."""
    with pytest.raises(RuntimeDown):
        await demultiplexed(b"\x07garbage", 100)


def test_limits_without_a_word_are_written(tmp_path: Path) -> None:
    """Raw keys and huge pages are written to the container's own folder."""
    folder = tmp_path / "c"
    folder.mkdir()
    for name in ("memory.high", "hugetlb.2MB.max"):
        (folder / name).write_text("max\n")
    where = parse_membership(["0::/c"], tmp_path)
    assert where is not None
    cgroups.write_extra(where, (HugepageLimit(page_size="2MB", limit_bytes=4096),), {"memory.high": "500"})
    assert ((folder / "hugetlb.2MB.max").read_text(), (folder / "memory.high").read_text()) == ("4096", "500")


@pytest.mark.parametrize("key", ["memory.max/../../x", "cgroup.procs", "memory", "../memory.max", "cgroup.kill", ""])
def test_unified_keys_are_an_allow_list(key: str) -> None:
    """No key leaves the container's folder or moves processes."""
    with pytest.raises(InvalidRequest):
        cgroups.check_extra((), {key: "1"}, version=2)
    assert cgroups.check_extra((), {"memory.high": "1", "memory.oom.group": "1"}, version=2) == ()
