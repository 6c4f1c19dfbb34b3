"""The checks of `doctor`: each is a function from what it looks at to findings, and knows how to mend what it finds.

Everything is read, nothing is changed and no program is started. Paths are looked up below `Node.root`, so that tests
can show it a node that is not this one. A check that fails by itself becomes a finding, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Literal

Grade = Literal["ok", "hint", "broken"]

_CAP_NET_ADMIN, _CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 12, 21, 24
_MIN_API = (1, 41)
_CNI_NEEDED = ("bridge", "host-local", "loopback", "portmap", "firewall")
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `mend` is empty when there is nothing to do."""

    check: str
    grade: Grade
    message: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """The node that is looked at; `root` is "/" but in tests."""

    root: Path = Path("/")

    def path(self, name: str | Path) -> Path:
        """Return where an absolute path of the node is found."""
        return self.root / str(name).lstrip("/")

    def read(self, name: str) -> str:
        """Return a small file without its line end, "" where it cannot be read."""
        with contextlib.suppress(OSError):
            return self.path(name).read_text(encoding="utf-8", errors="replace").strip()
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The parts of the configuration that checks need, with what holds when the file does not say."""

    socket: Path = Path("/run/dispatcher/cri.sock")
    state_dir: Path = Path("/var/lib/dispatcher")
    run_dir: Path = Path("/run/dispatcher")
    metrics_address: tuple[str, int] | None = None
    cgroup_driver: str = "auto"
    plugins: tuple[str, ...] = ()
    docker_socket: Path = Path("/var/run/docker.sock")
    cni_conf_dirs: tuple[Path, ...] = (Path("/etc/cni/net.d"),)
    cni_bin_dirs: tuple[Path, ...] = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
    cni_default_allowed: bool = False
    sections: Mapping[str, Any] = field(default_factory=dict)


def read_settings(path: str | None) -> Settings | None:
    """Return what `doctor` needs of the configuration, None when it cannot be loaded."""
    from dispatcher.commands.config_files import load
    from dispatcher.commands.output import Failure

    try:
        config = load(path).config
    except Failure:
        return None
    defaults = Settings()
    docker, cni = config.plugins.section("docker_shim"), config.plugins.section("cni")
    default_network = cni.get("default_network")
    return Settings(
        socket=config.socket.path,
        state_dir=config.state_dir,
        run_dir=config.run_dir,
        metrics_address=(config.metrics.host, config.metrics.port) if config.metrics.enabled else None,
        cgroup_driver=config.cgroup_driver,
        plugins=tuple(config.plugins.enabled),
        docker_socket=Path(str(docker.get("socket", defaults.docker_socket))),
        cni_conf_dirs=_paths(cni.get("conf_dirs"), defaults.cni_conf_dirs),
        cni_bin_dirs=_paths(cni.get("bin_dirs"), defaults.cni_bin_dirs),
        cni_default_allowed=isinstance(default_network, dict) and default_network.get("allow") is True,
    )


def _paths(value: object, default: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(Path(str(item)) for item in value) if isinstance(value, list) else default


Check = Callable[[Node, Settings], Iterator[Finding]]


def run_checks(node: Node, config_file: str | None) -> list[Finding]:
    """Run all checks and return their findings in a fixed order."""
    from dispatcher.commands.config_files import check_files

    problems, warnings = check_files(config_file)
    findings = [
        Finding("config", "broken", problem, "`dispatcher config check` checks all of it") for problem in problems
    ]
    findings += [Finding("config", "hint", warning) for warning in warnings]
    settings = read_settings(config_file) or Settings()
    if not problems:
        findings.append(Finding("config", "ok", "configuration and policy load, and the policy's own tests hold"))
    for name, check in CHECKS:
        try:
            findings += check(node, settings)
        except Exception as error:  # noqa: BLE001 - one check that fails must not hide the others
            findings.append(Finding(name, "hint", f"the check itself failed: {type(error).__name__}: {error}"))
    return findings


def check_python(node: Node, settings: Settings) -> Iterator[Finding]:
    """The interpreter, and the plugins' distributions."""
    del node
    from importlib import metadata

    yield Finding("python", "ok", f"Python {platform.python_version()} at {sys.executable}")
    offered = {entry.name for entry in metadata.entry_points(group="dispatcher.plugins")}
    missing = [name for name in settings.plugins if name not in offered]
    if missing:
        yield Finding(
            "plugins",
            "broken",
            f"enabled but not installed: {', '.join(missing)}",
            "pip install the distributions that bring them, or take them out of plugins.enabled",
        )
    else:
        yield Finding("plugins", "ok", f"installed: {', '.join(sorted(offered)) or 'none'}")


def check_privileges(node: Node, settings: Settings) -> Iterator[Finding]:
    """The daemon makes namespaces and mounts."""
    del settings
    line = next((line for line in node.read("/proc/self/status").splitlines() if line.startswith("CapEff:")), "")
    held = int(line.split()[1], 16) if line else 0
    if not held >> _CAP_SYS_ADMIN & 1 or not held >> _CAP_NET_ADMIN & 1:
        yield Finding(
            "privileges",
            "broken",
            "CAP_SYS_ADMIN and CAP_NET_ADMIN are needed for namespaces, mounts and networks",
            "run as root, outside of an unprivileged container",
        )
    elif not held >> _CAP_SYS_RESOURCE & 1:
        yield Finding(
            "privileges",
            "hint",
            "no CAP_SYS_RESOURCE: negative oom scores and raised limits will be lowered to what is allowed, with a note",
        )
    else:
        yield Finding("privileges", "ok", "all capabilities that the daemon needs")


def cgroup_version(node: Node) -> Literal["v1", "v2", "hybrid", "none"]:
    """Return which cgroup hierarchy holds the controllers."""
    if node.path("/sys/fs/cgroup/cgroup.controllers").is_file():
        return "v2"
    if node.path("/sys/fs/cgroup/memory").is_dir():
        return "hybrid" if node.path("/sys/fs/cgroup/unified/cgroup.controllers").is_file() else "v1"
    return "none"


def check_cgroups(node: Node, settings: Settings) -> Iterator[Finding]:
    """The hierarchy, its controllers, and the driver."""
    version = cgroup_version(node)
    if version == "none":
        mend = "mount it: mount -t cgroup2 none /sys/fs/cgroup"
        yield Finding("cgroups", "broken", "no cgroup hierarchy at /sys/fs/cgroup", mend)
        return
    if version == "v2":
        controllers = set(node.read("/sys/fs/cgroup/cgroup.controllers").split())
    else:
        found = node.path("/sys/fs/cgroup").iterdir()
        controllers = {part for entry in found if entry.is_dir() for part in entry.name.split(",")}
    missing = sorted({"cpu", "memory", "pids"} - controllers)
    booted = node.path("/run/systemd/system").is_dir()
    driver = settings.cgroup_driver
    driver = ("systemd" if booted else "cgroupfs") + " (detected)" if driver == "auto" else driver
    if missing:
        mend = "boot with them: for memory, cgroup_enable=memory on the kernel command line"
        yield Finding("cgroups", "broken", f"cgroup {version} without {', '.join(missing)}", mend)
    elif settings.cgroup_driver == "systemd" and not booted:
        mend = "set cgroup_driver: cgroupfs, or auto"
        yield Finding("cgroups", "broken", "the systemd driver is configured, but systemd does not run", mend)
    else:
        yield Finding("cgroups", "ok", f"cgroup {version}, driver {driver}")


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _ask_engine(path: Path, what: str) -> dict[str, Any]:
    connection = _UnixConnection(str(path))
    try:
        connection.request("GET", what)
        reply = connection.getresponse()
        body = json.loads(reply.read(4 << 20))
        if reply.status != 200 or not isinstance(body, dict):
            raise HTTPException(f"status {reply.status}")
        return body
    finally:
        connection.close()


def check_docker(node: Node, settings: Settings) -> Iterator[Finding]:
    """The Docker Engine behind privileged and host-namespace pods."""
    if settings.plugins and "docker_shim" not in settings.plugins:
        yield Finding("docker", "ok", "docker_shim is not enabled")
        return
    path = node.path(settings.docker_socket)
    try:
        version, facts = _ask_engine(path, "/version"), _ask_engine(path, "/info")
    except FileNotFoundError:
        yield Finding(
            "docker",
            "broken",
            f"{settings.docker_socket} does not exist",
            "apt-get install docker.io && systemctl start docker; or name its socket in the section docker_shim",
        )
        return
    except PermissionError:
        yield Finding("docker", "broken", f"{settings.docker_socket} is not open to this user", "run as root")
        return
    except (OSError, HTTPException, ValueError) as error:
        mend = "systemctl restart docker; journalctl -u docker says why it does not answer"
        yield Finding("docker", "broken", f"{settings.docker_socket} does not answer: {error}", mend)
        return
    yield from _judge_engine(version, facts, node, settings)


def _judge_engine(
    version: Mapping[str, Any], facts: Mapping[str, Any], node: Node, settings: Settings
) -> Iterator[Finding]:
    api = str(version.get("ApiVersion", "0.0"))
    name = f"Docker Engine {version.get('Version')}, API {api}, {facts.get('Driver')}"
    if tuple(int(part) for part in api.split(".")) < _MIN_API:
        yield Finding("docker", "broken", f"{name}: older than API 1.41", "upgrade to Docker Engine 20.10 or newer")
    else:
        yield Finding("docker", "ok", name)
    if not facts.get("LiveRestoreEnabled"):
        yield Finding(
            "docker live-restore",
            "hint",
            "off: a restart of the engine ends all Docker pods",
            'put {"live-restore": true} into /etc/docker/daemon.json, then systemctl reload docker',
        )
    else:
        yield Finding("docker live-restore", "ok", "on")
    engine_driver = str(facts.get("CgroupDriver", ""))
    wanted = settings.cgroup_driver
    if wanted != "auto" and engine_driver not in ("", wanted):
        yield Finding(
            "docker cgroups",
            "broken",
            f"the engine uses the driver {engine_driver}, dispatcher.yaml says {wanted}",
            f"set cgroup_driver: {engine_driver} (or auto), or native.cgroupdriver={wanted} in daemon.json",
        )
    kubelet = _kubelet_setting(node, "cgroupDriver")
    if kubelet and engine_driver and kubelet != engine_driver:
        yield Finding(
            "docker cgroups",
            "hint",
            f"the kubelet's config says {kubelet}, the engine uses {engine_driver}",
            "a kubelet since 1.28 asks us; an older one needs the same driver as the engine",
        )


def _kubelet_setting(node: Node, key: str) -> str:
    """Return a top-level setting of the kubelet's config, "" where there is none."""
    for line in node.read("/var/lib/kubelet/config.yaml").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return value.strip().strip("\"'")
    return ""


def check_kubelet(node: Node, settings: Settings) -> Iterator[Finding]:
    """Whether a kubelet on this node talks to us."""
    if not node.path("/var/lib/kubelet/config.yaml").is_file():
        yield Finding("kubelet", "ok", "no kubelet is set up on this node")
        return
    endpoint = _kubelet_setting(node, "containerRuntimeEndpoint")
    ours = f"unix://{settings.socket}"
    if endpoint and endpoint != ours:
        mend = f"set containerRuntimeEndpoint: {ours} in /var/lib/kubelet/config.yaml, and drain the node first"
        yield Finding("kubelet", "hint", f"it uses {endpoint}", mend)
    else:
        yield Finding("kubelet", "ok", f"it uses {endpoint or 'what its command line says'}")


def _cni_configs(node: Node, settings: Settings) -> list[Path]:
    found: list[Path] = []
    for folder in settings.cni_conf_dirs:
        path = node.path(folder)
        if path.is_dir():
            found += sorted(item for item in path.iterdir() if item.suffix in (".conflist", ".conf", ".json"))
    return found


def check_cni(node: Node, settings: Settings) -> Iterator[Finding]:
    """A network configuration that loads, and the plugins that it names."""
    if settings.plugins and "cni" not in settings.plugins:
        yield Finding("cni", "ok", "the plugin cni is not enabled")
        return
    folders = ", ".join(str(folder) for folder in settings.cni_bin_dirs)
    needed: tuple[str, ...] = ()
    configs = _cni_configs(node, settings)
    if configs:
        try:
            data = json.loads(configs[0].read_text(encoding="utf-8"))
            needed = tuple(str(item["type"]) for item in data.get("plugins", [data]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{configs[0]} cannot be read: {type(error).__name__}: {error}"
            yield Finding("cni", "broken", message, "mend the file; it is the first one, so it is the one in use")
            return
        yield Finding("cni", "ok", f"{configs[0].name} with {', '.join(needed)}")
    elif settings.cni_default_allowed:
        needed = _CNI_NEEDED
        yield Finding("cni", "ok", "no configuration of its own: the default bridge network will be used")
    else:
        yield Finding(
            "cni",
            "broken",
            f"no network configuration in {', '.join(map(str, settings.cni_conf_dirs))}",
            "install one (see docs/), or allow the default bridge: plugins.cni.default_network.allow: true",
        )
    missing = [
        name
        for name in needed
        if not any(os.access(node.path(folder) / name, os.X_OK) for folder in settings.cni_bin_dirs)
    ]
    if missing:
        mend = "apt-get install containernetworking-plugins; or name their folder in plugins.cni.bin_dirs"
        yield Finding("cni plugins", "broken", f"{', '.join(missing)} not found in {folders}", mend)
    elif needed:
        yield Finding("cni plugins", "ok", f"found in {folders}")


def check_firewall(node: Node, settings: Settings) -> Iterator[Finding]:
    """What the network plugins portmap and firewall call, and what lets bridges forward."""
    del settings
    folders = os.pathsep.join(
        str(node.path(folder)) for folder in ("/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin")
    )
    if shutil.which("iptables", path=folders) is None:
        mend = "apt-get install iptables"
        yield Finding("iptables", "broken", "not found: port mappings and masquerading need it", mend)
    else:
        yield Finding("iptables", "ok", "found")
    if node.read("/proc/sys/net/ipv4/ip_forward") != "1":
        yield Finding(
            "ip_forward",
            "hint",
            "off: pods reach nothing outside of the node",
            "sysctl -w net.ipv4.ip_forward=1, and keep it in /etc/sysctl.d/90-dispatcher.conf",
        )
    else:
        yield Finding("ip_forward", "ok", "on")
    bridged = node.read("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if bridged != "1":
        yield Finding(
            "br_netfilter",
            "hint",
            "not loaded" if not bridged else "bridge-nf-call-iptables is 0",
            "Services need it: modprobe br_netfilter; echo br_netfilter > /etc/modules-load.d/dispatcher.conf; "
            "sysctl -w net.bridge.bridge-nf-call-iptables=1",
        )
    else:
        yield Finding("br_netfilter", "ok", "bridged packets pass iptables")


def check_kvm(node: Node, settings: Settings) -> Iterator[Finding]:
    """Reported only: pods in virtual machines are slower without it, and the device may exist and still not work."""
    del settings
    device = node.path("/dev/kvm")
    if not device.exists():
        yield Finding("kvm", "ok", "no /dev/kvm: virtual machines will be emulated")
    elif os.access(device, os.R_OK | os.W_OK):
        yield Finding("kvm", "ok", "/dev/kvm is there; whether it runs a guest is probed by the VM runtime")
    else:
        yield Finding("kvm", "ok", "/dev/kvm is not open to this user")


def _parent_that_exists(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_folders(node: Node, settings: Settings) -> Iterator[Finding]:
    """The daemon's folders, their owner and their mode."""
    for name, folder in (("state folder", settings.state_dir), ("run folder", settings.run_dir)):
        path = node.path(folder)
        try:
            facts = path.stat()
        except FileNotFoundError:
            parent = _parent_that_exists(path)
            if os.access(parent, os.W_OK):
                yield Finding(name, "ok", f"{folder} will be made")
            else:
                yield Finding(name, "broken", f"{folder} cannot be made in {parent}", "run as root")
            continue
        mode = stat.S_IMODE(facts.st_mode)
        if not stat.S_ISDIR(facts.st_mode):
            yield Finding(name, "broken", f"{folder} is no folder", f"move it away: mv {folder} {folder}.old")
        elif facts.st_uid not in (0, os.geteuid()):
            yield Finding(name, "broken", f"{folder} belongs to uid {facts.st_uid}", f"chown root: {folder}")
        elif mode & 0o022:
            yield Finding(name, "broken", f"{folder} can be written by others ({mode:04o})", f"chmod 0700 {folder}")
        elif mode & 0o055 and folder == settings.state_dir:
            yield Finding(name, "hint", f"{folder} can be read by others ({mode:04o})", f"chmod 0700 {folder}")
        else:
            yield Finding(name, "ok", f"{folder} ({mode:04o})")


def check_disk(node: Node, settings: Settings) -> Iterator[Finding]:
    """Free space and inodes where images and records live."""
    path = _parent_that_exists(node.path(settings.state_dir))
    facts = os.statvfs(path)
    free, total = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
    inodes = facts.f_favail / facts.f_files if facts.f_files else 1.0
    said = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free at {path}"
    mend = "remove what is not needed; `dispatcher status --config` shows the folders"
    if free < _GIB // 2 or inodes < 0.01:
        yield Finding("disk", "broken", f"{said}, {inodes:.0%} of inodes", mend)
    elif free < 5 * _GIB or free < total * 0.10 or inodes < 0.05:
        yield Finding("disk", "hint", f"{said}, {inodes:.0%} of inodes: a kubelet will soon evict pods", mend)
    else:
        yield Finding("disk", "ok", said)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def check_socket(node: Node, settings: Settings) -> Iterator[Finding]:
    """The endpoint: private, and answered by somebody when it exists."""
    path = node.path(settings.socket)
    try:
        facts = path.lstat()
    except FileNotFoundError:
        yield Finding("socket", "ok", f"{settings.socket} is free: the daemon is not running")
        return
    mode = stat.S_IMODE(facts.st_mode)
    if not stat.S_ISSOCK(facts.st_mode):
        yield Finding("socket", "broken", f"{settings.socket} is no socket", f"move it away: mv {path} {path}.old")
    elif mode & 0o077:
        yield Finding(
            "socket",
            "broken",
            f"{settings.socket} is open to others ({mode:04o}): who can write to it is root on this node",
            f"chmod 0600 {path}",
        )
    elif _answers(path):
        yield Finding("socket", "ok", f"{settings.socket}: a daemon answers")
    else:
        mend = "nothing has to be done: the next start of the daemon replaces it"
        yield Finding("socket", "hint", f"{settings.socket} is left over from a daemon that is gone", mend)


def check_port(node: Node, settings: Settings) -> Iterator[Finding]:
    """The port of metrics and health: free, or ours."""
    if settings.metrics_address is None:
        yield Finding("metrics port", "ok", "metrics are off")
        return
    host, port = settings.metrics_address
    if port == 0:
        yield Finding("metrics port", "ok", "any free port")
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if _answers(node.path(settings.socket)):
                yield Finding("metrics port", "ok", f"{host}:{port} is in use while the daemon runs")
            else:
                mend = f"`ss -ltnp 'sport = :{port}'` shows by whom; or choose another port in dispatcher.yaml"
                yield Finding("metrics port", "broken", f"{host}:{port}: {error.strerror}", mend)
            return
    yield Finding("metrics port", "ok", f"{host}:{port} is free")


def check_limits(node: Node, settings: Settings) -> Iterator[Finding]:
    """Kernel limits that many pods run into."""
    del settings
    for name, enough in (("fs.inotify.max_user_instances", 512), ("fs.inotify.max_user_watches", 65536)):
        text = node.read("/proc/sys/" + name.replace(".", "/"))
        if text.isdigit() and int(text) < enough:
            yield Finding(name, "hint", f"{text} is little for a node with many pods", f"sysctl -w {name}={enough}")
    release = platform.release()
    yield Finding("kernel", "ok", release)


CHECKS: tuple[tuple[str, Check], ...] = (
    ("python", check_python),
    ("privileges", check_privileges),
    ("cgroups", check_cgroups),
    ("docker", check_docker),
    ("kubelet", check_kubelet),
    ("cni", check_cni),
    ("firewall", check_firewall),
    ("kvm", check_kvm),
    ("folders", check_folders),
    ("disk", check_disk),
    ("socket", check_socket),
    ("port", check_port),
    ("limits", check_limits),
)
