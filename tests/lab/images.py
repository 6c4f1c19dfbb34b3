"""Offline test images: root file systems from this machine's own programs, built as layers in Python, pushed by HTTP.

No engine builds anything, so the images exist before any runtime works. The names are those which a CRI conformance
run asks for; a node under test reaches them through its mirror table, which maps each upstream host to the lab
registry. Builds are deterministic: the same machine gives the same digests.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from tests.lab.child import PartMissingError, find_program
from tests.lab.registry import Registry

ARCHITECTURE: Final = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
UPSTREAM_HOSTS: Final = ("registry.k8s.io", "gcr.io", "k8s.gcr.io")

BUSYBOX: Final = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
NGINX: Final = "registry.k8s.io/e2e-test-images/nginx:1.14-2"
HTTPD: Final = "registry.k8s.io/e2e-test-images/httpd:2.4.39-4"
NO_NEW_PRIVS: Final = "registry.k8s.io/e2e-test-images/nonewprivs:1.3"
PAUSE: Final = "registry.k8s.io/pause:3.9"
PAUSE_OLD_NAME: Final = "k8s.gcr.io/pause:3.9"
HOSTNET_NGINX: Final = f"gcr.io/k8s-staging-cri-tools/hostnet-nginx-{ARCHITECTURE}"
STAGING: Final = "gcr.io/k8s-staging-cri-tools"
PREDEFINED_GROUP: Final = f"{STAGING}/test-image-predefined-group"
HOSTNET_PORT: Final = 12003

DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD: Final = "application/vnd.oci.image.layer.v1.tar+zstd"
OCI_LAYER_PLAIN: Final = "application/vnd.oci.image.layer.v1.tar"

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSWD = """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
"""
_GROUP = "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n"
# Programs beside busybox's: the multi-call binary lacks some of these and has others in a form that tests cannot use.
_EXTRA_PROGRAMS = ("ipcs", "ipcmk", "ipcrm", "unshare", "pgrep")


def digest_of(data: bytes) -> str:
    """The content address of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Tree:
    """A file tree that becomes a layer: sorted, without times, all owned by root unless said otherwise."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[tarfile.TarInfo, bytes]] = {}

    def folder(self, path: str, mode: int = 0o755) -> Tree:
        """Add a folder and its parents."""
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth])
            if name not in self._members or depth == len(parts):
                self._add(name, b"", type_=tarfile.DIRTYPE, mode=mode if depth == len(parts) else 0o755)
        return self

    def file(self, path: str, content: bytes | str, mode: int = 0o644, *, uid: int = 0, gid: int = 0) -> Tree:
        """Add a regular file; parents are made."""
        self._parents(path)
        data = content.encode() if isinstance(content, str) else content
        self._add(path.strip("/"), data, type_=tarfile.REGTYPE, mode=mode, uid=uid, gid=gid)
        return self

    def hard_link(self, path: str, target: str) -> Tree:
        """Add another name of a file of this tree."""
        self._parents(path)
        self._add(path.strip("/"), b"", type_=tarfile.LNKTYPE, mode=0o755, link=target.strip("/"))
        return self

    def symlink(self, path: str, target: str) -> Tree:
        """Add a symbolic link."""
        self._parents(path)
        self._add(path.strip("/"), b"", type_=tarfile.SYMTYPE, mode=0o777, link=target)
        return self

    def whiteout(self, path: str) -> Tree:
        """Hide a path of a lower layer."""
        folder, _slash, name = path.strip("/").rpartition("/")
        return self.file(f"{folder}/.wh.{name}", b"")

    def program(self, source: str, path: str, mode: int = 0o755) -> Tree:
        """Add a program of this machine with the shared libraries that it needs."""
        self.file(path, Path(source).read_bytes(), mode)
        listed = subprocess.run(["ldd", source], capture_output=True, text=True, check=False)
        for library in re.findall(r"(/\S+) \(0x", listed.stdout):
            self.file(library, Path(library).read_bytes(), 0o755)
        return self

    def tar(self) -> bytes:
        """The layer, uncompressed. Hard links come after all files, since their targets must exist."""
        buffer = io.BytesIO()
        order = sorted(self._members, key=lambda name: (self._members[name][0].type == tarfile.LNKTYPE, name))
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in order:
                info, data = self._members[name]
                archive.addfile(info, io.BytesIO(data) if data else None)
        return buffer.getvalue()

    def _parents(self, path: str) -> None:
        parent = path.strip("/").rpartition("/")[0]
        if parent and parent not in self._members:
            self.folder(parent)

    def _add(
        self, name: str, data: bytes, *, type_: bytes, mode: int, link: str = "", uid: int = 0, gid: int = 0
    ) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size, info.linkname = type_, mode, len(data), link
        info.uid, info.gid = uid, gid
        self._members[name] = (info, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer as it is stored (`blob`) with the digest of its uncompressed form."""

    blob: bytes
    diff_id: str
    media_type: str = DOCKER_LAYER

    @classmethod
    def gzip(cls, tar: bytes, media_type: str = DOCKER_LAYER) -> Layer:
        """Compress a tar with gzip, without a time in the header."""
        return cls(blob=gzip.compress(tar, 1, mtime=0), diff_id=digest_of(tar), media_type=media_type)

    @classmethod
    def zstd(cls, tar: bytes) -> Layer:
        """Compress a tar with zstd."""
        import zstandard

        return cls(
            blob=zstandard.ZstdCompressor(level=3).compress(tar), diff_id=digest_of(tar), media_type=OCI_LAYER_ZSTD
        )

    @classmethod
    def plain(cls, tar: bytes) -> Layer:
        """Store a tar as it is."""
        return cls(blob=tar, diff_id=digest_of(tar), media_type=OCI_LAYER_PLAIN)


@dataclass(frozen=True, kw_only=True)
class Image:
    """Layers with the process defaults (`Cmd`, `User`, `Env`, ...) of an image configuration."""

    layers: Sequence[Layer]
    process: Mapping[str, object] = field(default_factory=dict)
    architecture: str = ARCHITECTURE
    oci: bool = False

    @cached_property
    def config(self) -> bytes:
        """The configuration document; its digest is the image's id."""
        document = {
            "architecture": self.architecture,
            "os": "linux",
            "config": {"Env": [_PATH], **self.process},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in self.layers]},
            "history": [{"created_by": "lab"} for _layer in self.layers],
        }
        return json.dumps(document, sort_keys=True).encode()

    @cached_property
    def manifest(self) -> bytes:
        """The manifest document; its digest is what `name@digest` names."""
        layers = [
            {
                "mediaType": layer.media_type if not self.oci else layer.media_type.replace(DOCKER_LAYER, OCI_LAYER),
                "size": len(layer.blob),
                "digest": digest_of(layer.blob),
            }
            for layer in self.layers
        ]
        config_type = OCI_CONFIG if self.oci else DOCKER_CONFIG
        document = {
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "config": {"mediaType": config_type, "size": len(self.config), "digest": digest_of(self.config)},
            "layers": layers,
        }
        return json.dumps(document, sort_keys=True).encode()

    @property
    def media_type(self) -> str:
        """The manifest's media type."""
        return OCI_MANIFEST if self.oci else DOCKER_MANIFEST

    @property
    def id(self) -> str:
        """The image id: the digest of the configuration."""
        return digest_of(self.config)

    @property
    def digest(self) -> str:
        """The digest of the manifest."""
        return digest_of(self.manifest)


def index_of(images: Iterable[Image]) -> bytes:
    """An OCI index that offers each image for its architecture."""
    manifests = [
        {
            "mediaType": image.media_type,
            "size": len(image.manifest),
            "digest": image.digest,
            "platform": {"architecture": image.architecture, "os": "linux"},
        }
        for image in images
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}, sort_keys=True).encode()


def push_blob(registry: Registry, repository: str, blob: bytes) -> str:
    """Upload a blob unless the repository has it. Returns its digest."""
    digest = digest_of(blob)
    if registry.request("HEAD", f"/v2/{repository}/blobs/{digest}").status == 200:
        return digest
    opened = registry.request("POST", f"/v2/{repository}/blobs/uploads/")
    _expect(opened.status == 202, f"upload to {repository} refused: {opened.status} {opened.body!r}")
    place = re.sub(r"^https?://[^/]+", "", opened.headers["location"])
    query = "&" if "?" in place else "?"
    headers = {"Content-Type": "application/octet-stream"}
    stored = registry.request("PUT", f"{place}{query}digest={digest}", headers=headers, body=blob)
    _expect(stored.status == 201, f"blob of {repository} refused: {stored.status} {stored.body!r}")
    return digest


def push_manifest(registry: Registry, repository: str, reference: str, manifest: bytes, media_type: str) -> str:
    """Upload a manifest under a tag or its digest. Returns its digest."""
    path = f"/v2/{repository}/manifests/{reference}"
    stored = registry.request("PUT", path, headers={"Content-Type": media_type}, body=manifest)
    _expect(stored.status == 201, f"manifest {repository}:{reference} refused: {stored.status} {stored.body!r}")
    return digest_of(manifest)


def push(registry: Registry, repository: str, tag: str, image: Image) -> str:
    """Upload an image. Returns the manifest's digest."""
    for layer in image.layers:
        push_blob(registry, repository, layer.blob)
    push_blob(registry, repository, image.config)
    return push_manifest(registry, repository, tag, image.manifest, image.media_type)


def push_index(registry: Registry, repository: str, tag: str, images: Sequence[Image]) -> str:
    """Upload images and an index of them. Returns the index's digest."""
    for image in images:
        push(registry, repository, image.digest, image)
    return push_manifest(registry, repository, tag, index_of(images), OCI_INDEX)


def write_oci_layout(folder: Path, image: Image, *, tag: str = "latest") -> Path:
    """Write an image as an OCI layout folder. Returns the folder."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)
    for blob in (*(layer.blob for layer in image.layers), image.config, image.manifest):
        (blobs / digest_of(blob).removeprefix("sha256:")).write_bytes(blob)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    entry = {
        "mediaType": image.media_type,
        "size": len(image.manifest),
        "digest": image.digest,
        "annotations": {"org.opencontainers.image.ref.name": tag},
    }
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return folder


class TestImages:
    """The set of images for the CRI suite, on a registry.

    `reference` gives the name by which a node pulls, `direct` the same image by the registry's own address.
    """

    __test__ = False  # pytest would collect it by its name

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.images: dict[str, Image] = {}
        self.missing: dict[str, str] = {}

    def push_all(self) -> None:
        """Build and upload everything that this machine's programs allow; the rest is noted in `missing`."""
        base = Layer.gzip(base_tree().tar())
        shell = Image(layers=[base], process={"Cmd": ["sh"]})
        self._push(BUSYBOX, shell)
        self._push(HTTPD, Image(layers=[base, _marker("www/index.html", "<h1>It works!</h1>\n")], process=_HTTPD))
        self._push_user_images(base)
        self._push_named_images(base)
        self._push_lab_images(base)
        self._guarded(NO_NEW_PRIVS, lambda: self._push(NO_NEW_PRIVS, _no_new_privs(base)))
        self._guarded(NGINX, lambda: self._push_web(base))

    def push_shell(self) -> None:
        """Build and upload only BUSYBOX, for who needs no other."""
        self._push(BUSYBOX, Image(layers=[Layer.gzip(base_tree().tar())], process={"Cmd": ["sh"]}))

    def need(self, reference: str) -> str:
        """Return the reference.

        Raises:
            PartMissingError: The image could not be built here.
        """
        if reference in self.missing:
            raise PartMissingError(f"test image {reference}: {self.missing[reference]}")
        return reference

    def direct(self, reference: str) -> str:
        """The same image by the lab registry's own address."""
        return f"{self.registry.address}/{reference.partition('/')[2]}"

    def get(self, reference: str) -> Image:
        """The built image of a reference (with tag)."""
        return self.images[_tagged(reference)]

    def _push(self, reference: str, image: Image) -> None:
        repository, _colon, tag = _tagged(reference).partition("/")[2].rpartition(":")
        push(self.registry, repository, tag, image)
        self.images[_tagged(reference)] = image

    def _guarded(self, reference: str, build: object) -> None:
        assert callable(build)
        try:
            build()
        except PartMissingError as exc:
            self.missing[reference] = str(exc)

    def _push_user_images(self, base: Layer) -> None:
        users = {"uid": "1002", "username": "www-data", "uid-group": "1003:1004", "username-group": "www-data:1004"}
        for name, user in users.items():
            self._push(f"{STAGING}/test-image-user-{name}", Image(layers=[base], process={"Cmd": ["sh"], "User": user}))
        accounts = Tree()
        accounts.file("etc/passwd", _PASSWD + "default-user:x:1000:1000::/home:/bin/sh\n")
        accounts.file("etc/group", _GROUP + "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
        layers = [base, Layer.gzip(accounts.tar())]
        self._push(PREDEFINED_GROUP, Image(layers=layers, process={"Cmd": ["sh"], "User": "1000"}))

    def _push_named_images(self, base: Layer) -> None:
        names = ["latest:latest", "tag:test", "tag:all", "digest:latest", "1:latest", "2:latest", "3:latest"]
        for name in names:
            image = Image(layers=[base, _marker("testfile", name)], process={"Cmd": ["sh"]})
            self._push(f"{STAGING}/test-image-{name}", image)
        tagged = Image(layers=[base, _marker("testfile", "tags")], process={"Cmd": ["sh"]})
        for tag in ("1", "2", "3"):
            self._push(f"{STAGING}/test-image-tags:{tag}", tagged)
        pause = Image(layers=[base], process={"Entrypoint": ["sleep", "2147483647"]})
        self._push(PAUSE, pause)
        self._push(PAUSE_OLD_NAME, pause)

    def _push_lab_images(self, base: Layer) -> None:
        """Images of our own questions: process defaults, indexes, other compressions."""
        process = {
            "Entrypoint": ["/bin/echo", "entrypoint"],
            "Cmd": ["cmd"],
            "Env": [_PATH, "FROM_IMAGE=yes", "SHARED=image"],
            "WorkingDir": "/var/www",
            "StopSignal": "SIGUSR1",
            "Labels": {"lab": "process"},
        }
        self._push("registry.k8s.io/lab/process:1", Image(layers=[base], process=process))
        self._push("registry.k8s.io/lab/empty:1", Image(layers=[_marker("file", "x")]))
        mine = Image(layers=[base, _marker("testfile", "mine")], process={"Cmd": ["sh"]}, oci=True)
        foreign = Image(layers=[_marker("testfile", "foreign")], architecture="s390x", oci=True)
        push_index(self.registry, "lab/index", "1", [foreign, mine])
        self.images["registry.k8s.io/lab/index:1"] = mine
        with suppress(ImportError):
            packed = Image(layers=[Layer.zstd(base_tree().tar())], process={"Cmd": ["sh"]}, oci=True)
            self._push("registry.k8s.io/lab/zstd:1", packed)

    def _push_web(self, base: Layer) -> None:
        web = Layer.gzip(nginx_tree().tar())
        for reference, port in ((NGINX, 80), (HOSTNET_NGINX, HOSTNET_PORT)):
            config = (
                "daemon off; user root; pid /var/run/nginx.pid; error_log /dev/stderr; events {} "
                f"http {{ access_log /dev/stdout; server {{ listen {port}; root /www; }} }}\n"
            )
            layers = [base, web, _marker("etc/nginx/nginx.conf", config)]
            self._push(reference, Image(layers=layers, process={"Cmd": ["nginx", "-c", "/etc/nginx/nginx.conf"]}))


_HTTPD: Mapping[str, object] = {"Cmd": ["sh", "-c", "echo httpd starts; exec httpd -f -p 80 -h /www"]}


def base_tree() -> Tree:
    """The root file system of all test images: busybox by hard links, a few real programs, accounts.

    Hard links, because masking one applet by a mount must not mask the shell.

    Raises:
        PartMissingError: No busybox, or one of the programs is not installed.
    """
    busybox = find_program("busybox")
    tree = Tree()
    for folder in ("dev", "etc", "home", "proc", "root", "run", "sbin", "sys", "usr/bin", "usr/sbin", "var/www", "www"):
        tree.folder(folder)
    tree.folder("tmp", 0o1777)
    tree.program(busybox, "bin/busybox")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for applet in set(listed.stdout.split()) - {"busybox", *_EXTRA_PROGRAMS}:
        tree.hard_link(f"bin/{applet}", "bin/busybox")
    tree.hard_link("usr/bin/env", "bin/busybox")
    for program in _EXTRA_PROGRAMS:
        tree.program(find_program(program), f"bin/{program}")
    return tree.file("etc/passwd", _PASSWD).file("etc/group", _GROUP)


def shell_runs_applets_itself() -> bool:
    """Whether this machine's busybox shell runs applets without looking at their files (Debian's static build does)."""
    done = subprocess.run(
        [find_program("busybox"), "sh", "-c", "PATH=/nonexistent; true; ls / >/dev/null"],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def nginx_tree() -> Tree:
    """The web server of this machine with its libraries and a page.

    Raises:
        PartMissingError: nginx is not installed.
    """
    tree = Tree().program(find_program("nginx"), "bin/nginx")
    for folder in ("etc/nginx", "run", "var/lib/nginx", "var/log/nginx"):
        tree.folder(folder)
    tree.symlink("var/run", "/run")
    return tree.file("www/index.html", "<h1>Welcome to nginx!</h1>\n")


def compile_static(source: str) -> bytes:
    """Compile a C program without shared libraries.

    Raises:
        PartMissingError: No compiler, or no static C library.
    """
    gcc = find_program("gcc")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        done = subprocess.run(
            [gcc, "-static", "-Os", "-s", "-x", "c", "-o", str(program), "-"],
            input=source.encode(),
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise PartMissingError(f"gcc cannot link statically: {done.stderr[-200:].decode(errors='replace')}")
        return program.read_bytes()


def _no_new_privs(base: Layer) -> Image:
    source = '#include <stdio.h>\n#include <unistd.h>\nint main(void){printf("Effective uid: %d\\n",geteuid());}\n'
    setuid = Tree().file("nnp", compile_static(source), 0o4755)
    return Image(layers=[base, Layer.gzip(setuid.tar())], process={"Entrypoint": ["/nnp"]})


def _marker(path: str, content: str) -> Layer:
    return Layer.gzip(Tree().file(path, content).tar())


def _tagged(reference: str) -> str:
    return reference if ":" in reference.rpartition("/")[2] else f"{reference}:latest"


def _expect(claim: bool, message: str) -> None:
    if not claim:
        raise RuntimeError(message)
