"""Machines by the real QEMU, from outside and from inside: start, disks, share, network, memory, adoption, end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from dispatcher.api import run_in_namespace
from dispatcher.errors import AlreadyExists, InvalidRequest, NotSupported, RuntimeDown
from dispatcher_hyper_vm.drivers import (
    Disk,
    GuestImage,
    LaunchSpec,
    NicSpec,
    RunningVm,
    SizeClass,
    TemplateScope,
    VmSpec,
    VmState,
)
from dispatcher_hyper_vm.drivers.qemu import QemuVmm
from dispatcher_hyper_vm.templates import TemplateLimits
from dispatcher_vm_kit.leaf import LeafLimits, find_leaf
from dispatcher_vm_kit.redirect import Joint, join_interfaces
from dispatcher_vm_kit.tap import make_tap, tap_name
from tests.hyper_vm.driver.conftest import Start, make_config, new_id
from tests.hyper_vm.driver.mini_guest import Gate, Talk
from tests.lab.child import wait_until
from tests.lab.wire import Wire, bind_mount

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]


def make_disk(path: Path, *, text: str = "") -> Path:
    """An ext4 image, with a file in it."""
    folder = path.with_suffix(".d")
    folder.mkdir()
    (folder / "file").write_text(text)
    with path.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(folder), str(path)], check=True, capture_output=True)
    return path


async def wait_disk(talk: Talk, serial: str) -> str:
    """The guest's name of the disk with this serial, once it is there."""
    find = (
        "for f in /sys/block/sd*; do grep -q %s $f/device/vpd_pg80 2>/dev/null && echo ${f##*/} && exit; done; exit 1"
    )
    async with asyncio.timeout(300):
        while (found := await talk.try_run(find % serial))[0] != 0:
            pass
    return f"/dev/{found[1]}"


async def test_clones_start_from_one_template(start: Start, vmm: QemuVmm) -> None:
    """Several at once have one template built, differ in user and place, and say where they come from."""
    machines = await asyncio.gather(*(start() for _ in range(3)))
    assert {vm.facts["boot"] for vm in machines} == {"template"}, [vm.facts["boot_reason"] for vm in machines]
    assert len({vm.facts["uid"] for vm in machines}) == 3
    (template,) = vmm.report()["templates"]
    assert template["clones"] >= 3
    assert 0 < template["bytes_held"] < 512 << 20
    for vm in machines:
        json.dumps(dict(vm.facts))
        talk = await Talk.open(vm.agent_socket)
        await talk.ping()
        assert await talk.run("nproc") == "1"
        await talk.run("echo 1 > /sys/devices/system/cpu/cpu1/online")
        assert await talk.run("nproc") == "2"
        await talk.close()
    assert {vm.id for vm in machines} <= set(vmm.machine_ids())


async def test_the_monitor_is_confined(start: Start, make_spec: Callable[..., VmSpec]) -> None:
    """Its own user, no rights, a system call filter, the pod's cgroup with its limits, nothing of the host in sight."""
    spec = make_spec()
    limits = LeafLimits(memory_bytes=900 << 20, pids=123)
    vm = await start(replace(spec, launch=replace(spec.launch, leaf_limits=limits)))
    process = Path("/proc") / str(vm.facts["pid"])
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    assert status["Uid"].split() == [str(vm.facts["uid"])] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert "etc" in os.listdir(process / "root")
    assert not {"root", "home", "var", "run", "sys"} & set(os.listdir(process / "root"))
    assert f"/cri-{vm.id}" in (process / "cgroup").read_text()
    assert vm.leaf is not None
    pids = vm.leaf.cgroup.folder("pids")
    assert pids is not None
    assert (pids / "pids.max").read_text().strip() == "123"
    devices = (process / "net/dev").read_text().splitlines()[2:]
    assert [line.partition(":")[0].strip() for line in devices] == ["lo"]


async def test_disks_come_and_go(start: Start, tmp_path: Path) -> None:
    """Found by serial; a shared one is read-only in both machines, a private one is written to; places are used again."""
    image, volume = make_disk(tmp_path / "image", text="of the image"), make_disk(tmp_path / "volume")
    image.chmod(0o400)
    vm, other = await asyncio.gather(start(), start())
    shared, private = (
        Disk(serial="image-1", path=image, read_only=True),
        Disk(serial="vol-1", path=volume, read_only=False),
    )
    for each in (vm, other):
        await each.attach_disk(shared)
        await each.attach_disk(shared)
    await vm.attach_disk(private)
    assert await vm.disks() == ("image-1", "vol-1")
    for each in (vm, other):
        talk = await Talk.open(each.agent_socket)
        device = await wait_disk(talk, "image-1")
        assert (
            await talk.run(f"mount -t ext4 -o ro,noload {device} /mnt && cat /mnt/file && umount /mnt")
            == "of the image"
        )
        assert (await talk.try_run(f"dd if=/dev/zero of={device} bs=512 count=1"))[0] != 0
        await talk.close()
    talk = await Talk.open(vm.agent_socket)
    device = await wait_disk(talk, "vol-1")
    await talk.run(f"mount -t ext4 {device} /mnt && echo from the guest > /mnt/file && umount /mnt")
    for _ in range(3):
        await vm.detach_disk("vol-1")
        await vm.detach_disk("vol-1")
        assert await vm.disks() == ("image-1",)
        await vm.attach_disk(private)
        await wait_disk(talk, "vol-1")
    await talk.close()
    await vm.detach_disk("vol-1")
    held = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{vm.facts['pid']}/fd")}
    assert str(image) in held
    assert str(volume) not in held
    read = subprocess.run(["debugfs", "-R", "cat file", str(volume)], check=True, capture_output=True, text=True)
    assert read.stdout == "from the guest\n"


async def test_odd_disks_are_refused(start: Start, tmp_path: Path) -> None:
    """What is not a disk, and serials that are none; the machine is none the worse."""
    vm = await start()
    for serial in ("", "UPPER", "a b", "x" * 37, "a,b"):
        with pytest.raises(InvalidRequest):
            await vm.attach_disk(Disk(serial=serial, path=tmp_path / "x", read_only=True))
    with pytest.raises(RuntimeDown, match="cannot be opened"):
        await vm.attach_disk(Disk(serial="none", path=tmp_path / "none", read_only=True))
    with pytest.raises(InvalidRequest):
        await vm.attach_disk(Disk(serial="null", path=Path("/dev/null"), read_only=True))
    assert await vm.disks() == ()
    assert await vm.state() is VmState.RUNNING


async def test_share_shows_later_binds(start: Start, make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    """A host folder that is bound into the share while the machine runs; its owners are kept; the share itself is read."""
    spec = make_spec(share_owner=True)
    vm = await start(spec)
    assert vm.facts["boot"] == "template"
    assert spec.share is not None
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("on the host")
    (source / "file").chmod(0o600)
    bind_mount(source, spec.share / "volume")
    talk = await Talk.open(vm.agent_socket)
    await talk.run("mount -t 9p -o trans=virtio,version=9p2000.L,msize=131072 share /mnt")
    assert await talk.run("cat /mnt/volume/file") == "on the host"
    await talk.run("echo new > /mnt/volume/new && chown 1234:5678 /mnt/volume/new && chmod 640 /mnt/volume/new")
    assert (await talk.try_run("touch /mnt/top"))[0] != 0
    assert (await talk.try_run("ln -s /etc/passwd /mnt/volume/link && cat /mnt/volume/link"))[1].count("root:") == 0
    await talk.close()
    status = (source / "new").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 5678, 0o640)


async def test_guest_is_on_the_pods_network(start: Start, make_spec: Callable[..., VmSpec], wire: Wire) -> None:
    """A restored machine on a tap answers on the pod's address, both families, and reaches out."""
    tap = await make_tap(wire.pod, 0)
    try:
        spec = make_spec(nics=(NicSpec(tap_fd=tap),))
        vm = await start(replace(spec, launch=replace(spec.launch, netns_path=wire.pod)))
    finally:
        os.close(tap)
    assert vm.facts["boot"] == "template"
    await join_interfaces(wire.pod, [Joint(tap=tap_name(0), interface="eth0")])
    talk = await Talk.open(vm.agent_socket)
    await talk.run("echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad; ip link set eth0 up")
    await talk.run("ip addr add 10.88.0.2/24 dev eth0 && ip -6 addr add fd88::2/64 dev eth0")
    assert os.stat(f"/proc/{vm.facts['pid']}/ns/net").st_ino == wire.pod.stat().st_ino
    await talk.run("nc -ll -p 7777 -e cat </dev/null >/dev/null 2>&1 &")
    for host in ("10.88.0.2", "fd88::2"):
        assert await asyncio.wait_for(run_in_namespace(wire.far, partial(_echo, host)), 200) == b"x" * 100_000
    await talk.close()


def _echo(host: str) -> bytes:
    import socket
    import time

    deadline = time.monotonic() + 120
    while True:
        try:
            with socket.create_connection((host, 7777), timeout=60) as connection:
                connection.sendall(b"x" * 100_000)
                connection.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionRefusedError:  # the guest does not listen yet
            if time.monotonic() > deadline:
                raise


async def test_pause_and_balloon(start: Start) -> None:
    """A halted machine says so; memory can be asked back and given again."""
    vm = await start()
    for _ in range(2):
        await vm.pause()
        assert await vm.state() is VmState.PAUSED
    for _ in range(2):
        await vm.resume()
        assert await vm.state() is VmState.RUNNING
    assert await vm.balloon_bytes() == 1 << 30
    await vm.set_balloon(900 << 20)
    async with asyncio.timeout(300):
        while await vm.balloon_bytes() != 900 << 20:
            await asyncio.sleep(0.05)
    await vm.set_balloon(1 << 40)
    async with asyncio.timeout(300):
        while await vm.balloon_bytes() != 1 << 30:
            await asyncio.sleep(0.05)


async def test_ends_have_reasons(start: Start, vmm: QemuVmm) -> None:
    """Power-off, panic, a killed monitor, and our own stopping are told apart; nothing of any of them stays."""
    off, panic, killed, stopped = await asyncio.gather(*(start() for _ in range(4)))
    for vm, line in ((off, "poweroff -f"), (panic, "echo c > /proc/sysrq-trigger")):
        talk = await Talk.open(vm.agent_socket)
        await talk.ping()
        talk.tell(line)
        async with asyncio.timeout(300):
            assert (await vm.wait()).reason == {"poweroff -f": "PoweredOff"}.get(line, "GuestPanic")
        await talk.close()
    os.kill(killed.facts["pid"], signal.SIGKILL)
    end = await killed.wait()
    assert (end.reason, end.exit_code) == ("Killed", -signal.SIGKILL)
    assert (await stopped.power_off(0)).reason == "Stopped"
    assert (await stopped.kill()).reason == "Stopped"
    for vm in (off, panic, killed, stopped):
        with pytest.raises(RuntimeDown):
            await vm.state()
        leaf = vm.leaf
        assert leaf is not None
        for _ in range(2):
            await vmm.remove(vm.id)
        assert vm.id not in vmm.machine_ids()
        assert not leaf.exists()
        assert not vm.console_log.exists()


async def test_one_machine_per_id(start: Start, vmm: QemuVmm) -> None:
    """A second start is refused and does not touch the first; unknown ids are removed without complaint."""
    vm = await start()
    with pytest.raises(AlreadyExists):
        await vmm.start(replace_id(vm, vmm))
    assert await vm.state() is VmState.RUNNING
    await vmm.remove(new_id())
    assert await vmm.adopt(new_id()) is None


def replace_id(vm: RunningVm, vmm: QemuVmm) -> VmSpec:
    guest = GuestImage(kernel=Path("/none"), initrd=Path("/none"), digest="")
    off = TemplateScope(kind="off")
    return VmSpec(id=vm.id, guest=guest, size=SizeClass(memory_bytes=1 << 28, vcpus=1), templates=off)


async def test_cold_boot_says_why(start: Start, make_spec: Callable[..., VmSpec], vm_folder: Path) -> None:
    """Where templates are off, a machine boots, and prints to its console log meanwhile."""
    vm = await start(templates=TemplateScope(kind="off"))
    assert (vm.facts["boot"], vm.facts["boot_reason"]) == ("cold", "templates are off")
    talk = await Talk.open(vm.agent_socket)
    await talk.ping()
    words = (await talk.run("cat /proc/cmdline")).split()
    assert {"console=ttyS0", "panic=-1"} <= set(words)
    assert not {"nokaslr", "mitigations=off"} & set(words)
    await talk.close()
    wait_until(lambda: b"the guest is up" in vm.console_log.read_bytes(), timeout_s=60, what="the console's log")


async def test_a_guest_that_fails_is_undone(vmm: QemuVmm, make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    """A kernel that is none: the error has QEMU's words, and nothing stays."""
    (tmp_path / "kernel").write_text("no kernel")
    broken = GuestImage(kernel=tmp_path / "kernel", initrd=tmp_path / "kernel", digest="broken")
    spec = make_spec(guest=broken, templates=TemplateScope(kind="off"))
    with pytest.raises(RuntimeDown, match=r"did not start.*kernel"):
        await vmm.start(spec)
    assert spec.id not in vmm.machine_ids()
    assert spec.launch.leaf is not None
    assert not spec.launch.leaf.exists()


async def test_a_refused_template_falls_back(vm_folder: Path, make_spec: Callable[..., VmSpec]) -> None:
    """A guest that never rests makes no template; its pods boot cold, with the reason, also the next ones."""

    class Restless(Gate):
        async def timer_rate(self, agent_socket: Path) -> float:
            return 250.0

    limits = TemplateLimits(build_s=0.1, wait_s=400)
    impatient = QemuVmm(make_config(vm_folder / "restless", templates=replace(limits, build_s=60)), Restless())
    try:
        spec = make_spec()
        vm = await impatient.start(spec)
        assert vm.facts["boot"] == "cold"
        assert "its template could not be made" in vm.facts["boot_reason"]
        await impatient.remove(spec.id)
        assert impatient.machine_ids() == ()
        assert impatient.report()["failures"]
    finally:
        await impatient.aclose()
        await impatient.recover()


async def test_namespaces_do_not_share_templates(vmm: QemuVmm, make_spec: Callable[..., VmSpec]) -> None:
    """With the scope "namespace" each has its own; machine, size, cards and guest make others, too."""
    acceleration = await vmm._accelerate()
    base = make_spec()
    other_guest = replace(base.guest, digest="other")
    specs = [
        base,
        replace(base, templates=TemplateScope(kind="namespace", domain="a")),
        replace(base, templates=TemplateScope(kind="namespace", domain="b")),
        replace(base, size=replace(base.size, vcpus=3)),
        replace(base, nics=()),
        replace(base, share=None),
        replace(base, guest=other_guest),
        replace(base, guest=replace(base.guest, words=("audit=0",))),
    ]
    assert len({vmm._maker.key(spec, acceleration).digest for spec in specs}) == len(specs)
    same = [replace(base, id=new_id(), share_owner=True), replace(base, launch=LaunchSpec())]
    assert {vmm._maker.key(spec, acceleration).digest for spec in same} == {vmm._maker.key(base, acceleration).digest}


DAEMON = """
import asyncio, os, pickle, sys
from tests.hyper_vm.driver.mini_guest import Gate
from dispatcher_hyper_vm.drivers.qemu import QemuVmm

async def main():
    config, spec = pickle.loads(bytes.fromhex(sys.argv[1]))
    vm = await QemuVmm(config, Gate()).start(spec)
    print("started", vm.facts["pid"], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def run_daemon(config: object, spec: VmSpec, *, failpoint: str = "") -> subprocess.Popen[str]:
    import pickle

    environment = {**os.environ, "DISPATCHER_FAILPOINTS": failpoint}
    argv = [sys.executable, "-c", DAEMON, pickle.dumps((config, spec)).hex()]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)


async def test_a_new_daemon_adopts(vm_folder: Path, make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    """The daemon that started a machine is killed; the next one finds it running, with its disks, and ends it."""
    spec = make_spec(templates=TemplateScope(kind="off"))
    config = make_config(vm_folder / "adopt")
    daemon = run_daemon(config, spec)
    assert daemon.stdout is not None
    try:
        line = await asyncio.to_thread(daemon.stdout.readline)
        pid = int(line.split()[1])
    finally:
        daemon.kill()
        daemon.wait()
        daemon.stdout.close()
    vmm = QemuVmm(config, Gate())
    image = make_disk(tmp_path / "image", text="x")
    for _ in range(2):
        vm = await vmm.adopt(spec.id)
        assert vm is not None
        assert vm.facts["pid"] == pid
        assert await vm.state() is VmState.RUNNING
        await vm.attach_disk(Disk(serial="one", path=image, read_only=True))
        talk = await Talk.open(vm.agent_socket)
        await talk.ping()
        await talk.close()
        await vm.aclose()
    vm = await vmm.adopt(spec.id)
    assert vm is not None
    assert await vm.disks() == ("one",)
    assert (await vm.power_off(0)).reason == "Stopped"
    assert await vmm.adopt(spec.id) is None
    await vmm.remove(spec.id)
    await vmm.aclose()
    assert vmm.machine_ids() == ()
    assert not find_leaf("", spec.id).exists()


POINTS = ("hyper_vm.make_folder", "vm.make_leaf", "vm.make_lock", "vm.listen", "vm.spawn", "hyper_vm.write_record")


@pytest.mark.parametrize("point", [f"{name}:{when}" for name in POINTS for when in ("before", "after")])
async def test_a_start_that_was_cut_short_is_undone(
    point: str, vm_folder: Path, make_spec: Callable[..., VmSpec]
) -> None:
    """The daemon dies at this very moment of a start: by the id alone the next one removes all of it."""
    spec = make_spec(templates=TemplateScope(kind="off"))
    config = make_config(vm_folder / "cut")
    daemon = run_daemon(config, spec, failpoint=f"{point}=kill")
    assert daemon.stdout is not None
    assert await asyncio.to_thread(daemon.stdout.read) == ""
    assert daemon.wait() == -signal.SIGKILL
    daemon.stdout.close()
    vmm = QemuVmm(config, Gate())
    await vmm.remove(spec.id, leaf=spec.launch.leaf)
    assert vmm.machine_ids() == ()
    assert [each.name for each in (vm_folder / "cut").glob("run/*")] == []
    assert spec.launch.leaf is not None
    assert not spec.launch.leaf.exists()
    assert not any(spec.id[:32] in _command(pid) for pid in os.listdir("/proc") if pid.isdigit())
    await vmm.aclose()


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""


async def test_no_monitor_on_the_node(vm_folder: Path, make_spec: Callable[..., VmSpec]) -> None:
    """Said by probe and by start, with what to install."""
    vmm = QemuVmm(make_config(vm_folder / "none", binary="qemu-system-none"), Gate())
    health = await vmm.probe()
    assert not health.ready
    assert "apt-get install" in health.message
    with pytest.raises(NotSupported):
        await vmm.start(make_spec())
    await vmm.aclose()
