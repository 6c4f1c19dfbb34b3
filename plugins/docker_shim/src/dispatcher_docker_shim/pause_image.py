"""The pause image: a static binary of ours, compiled on the node, in an image that is made here. Nothing is pulled.

The binary is kept under the plugin's folder by the digest of its source; the image's tar is a function of the binary,
byte for byte, so the engine gets the same image whenever it has to be loaded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import platform
import tarfile
import tempfile
from importlib.resources import files
from pathlib import Path

from dispatcher.api import effect
from dispatcher.errors import NotSupported
from dispatcher_docker_shim.docker_client import DockerClient
from dispatcher_docker_shim.exec import FLAGS, compile_pause, find_compiler

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class PauseImage:
    """Makes sure that the engine has the pause image."""

    def __init__(self, client: DockerClient, *, folder: Path, repository: str, compilers: tuple[str, ...]) -> None:
        self._client = client
        self._folder = folder
        self._repository = repository
        self._compilers = compilers
        self._lock = asyncio.Lock()
        self._tag = ""

    async def ensure(self) -> str:
        """Return the image's tag in the engine, making it if needed. Idempotent; concurrent calls share the work.

        Raises:
            NotSupported: no compiler on the node, or it failed; the message says what to install.
        """
        async with self._lock:
            binary = await self._binary()
            tag = f"{self._repository}/pause:{hashlib.sha256(binary).hexdigest()[:24]}"
            if self._tag != tag or await self._client.find_image(tag) is None:
                await self._load(binary, tag)
                self._tag = tag
            return tag

    def forget(self) -> None:
        """Look again at the next `ensure`: another engine process may know less."""
        self._tag = ""

    @effect("docker.build_pause")
    async def _binary(self) -> bytes:
        source = source_text()
        key = hashlib.sha256("\0".join((source, *FLAGS, platform.machine())).encode()).hexdigest()[:24]
        kept = self._folder / f"pause-{key}"
        with contextlib.suppress(FileNotFoundError):
            return kept.read_bytes()
        if platform.machine() not in _ARCHITECTURES:
            raise NotSupported(f"the pause binary knows x86_64 and aarch64, this node is {platform.machine()}")
        compiler = find_compiler(self._compilers)
        if compiler is None:
            raise NotSupported(
                f"the pause binary has to be compiled once, but none of {', '.join(self._compilers)} is installed; "
                "install gcc and linux-libc-dev (apt-get install gcc libc6-dev)",
            )
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pause-", dir=self._folder) as work:
            path = Path(work) / "pause.c"
            path.write_text(source, encoding="utf-8")
            await compile_pause(compiler, path, Path(work) / "pause")
            _keep(Path(work) / "pause", kept)
        return kept.read_bytes()

    @effect("docker.load_pause")
    async def _load(self, binary: bytes, tag: str) -> None:
        if await self._client.find_image(tag) is not None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".pause-", suffix=".tar", dir=self._folder) as archive:
            archive.write(image_tar(binary, tag, _ARCHITECTURES.get(platform.machine(), platform.machine())))
            archive.flush()
            await self._client.load(Path(archive.name))


def source_text() -> str:
    """The C source that is shipped with the plugin."""
    return files("dispatcher_docker_shim").joinpath("pause", "pause.c").read_text(encoding="utf-8")


@effect("docker.keep_pause_binary")
def _keep(made: Path, kept: Path) -> None:
    os.replace(made, kept)


def image_tar(binary: bytes, tag: str, architecture: str) -> bytes:
    """A tar for `docker load` with one layer: the binary and the file that the namespace is mounted on. Pure."""
    layer = _tar({"netns": (b"", 0o444), "pause": (binary, 0o555)})
    diff_id = hashlib.sha256(layer).hexdigest()
    config = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {"Entrypoint": ["/pause"], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "cri-dispatcher"}],
        },
        sort_keys=True,
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [tag], "Layers": [f"{diff_id}/layer.tar"]}]
    return _tar(
        {
            config_name: (config, 0o444),
            f"{diff_id}/layer.tar": (layer, 0o444),
            "manifest.json": (json.dumps(manifest, sort_keys=True).encode(), 0o444),
        },
    )


def _tar(content: dict[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, (data, mode) in sorted(content.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
