"""Sandboxes: the pause in the pod's own namespace, what containers share of it, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from dispatcher.errors import InvalidRequest, NotSupported
from dispatcher.model import Liveness, NamespaceMode, NamespaceOptions, ObservedPod, PodSecurity, UserNamespace
from tests.docker.kit import DEADLINE_S, World, container_spec, pod_spec, security

pytestmark = [pytest.mark.lab, pytest.mark.asyncio(loop_scope="session")]


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


async def test_pause_runs_in_the_pods_namespace_without_any_privilege(world: World) -> None:
    """The engine's process for a pod stands in our namespace, as nobody, with no capability and no way to get one."""
    pod = await world.make_pod()
    assert pod.attachment is not None
    status = status_of(pod.facts["pid"])
    assert os.stat(f"/proc/{pod.facts['pid']}/ns/net").st_ino == os.stat(pod.attachment.netns_path).st_ino
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Uid"].split()[0], status["Seccomp"]) == ("1", "65534", "2")
    await world.remove_pod(pod)


async def test_containers_share_the_pods_namespaces(world: World, busybox: str) -> None:
    """Network and IPC are the pod's, the host name is the pod's, and PIDs too where the pod asks for it."""
    pod = await world.make_pod()
    script = "readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; hostname; cat /proc/1/comm; true"
    shared = security(namespaces=NamespaceOptions(pid=NamespaceMode.POD))
    first = (await world.text(pod, busybox, "sh", "-c", script, security=shared)).split()
    second = (await world.text(pod, busybox, "sh", "-c", script)).split()
    assert first[:2] == second[:2]
    assert first[0] == f"net:[{pod.facts['netns']}]"
    assert first[1] == os.readlink(f"/proc/{pod.facts['pid']}/ns/ipc") != os.readlink("/proc/self/ns/ipc")
    assert (first[2], first[3], second[3]) == ("pod", "pause", "sh")
    await world.remove_pod(pod)


async def test_pause_reaps_orphans_of_a_shared_pid_namespace(world: World, busybox: str) -> None:
    """In a shared PID namespace nobody but the pause can reap what a container left behind."""
    pod = await world.make_pod()
    shared = security(namespaces=NamespaceOptions(pid=NamespaceMode.POD))
    script = "(sleep 0.05 &); while ps -o comm | grep -q '[s]leep'; do :; done; ps -o stat,comm"
    rows = (await world.text(pod, busybox, "sh", "-c", script, security=shared)).splitlines()
    assert "pause" in rows[1]
    assert not [row for row in rows if row.startswith("Z")]
    await world.remove_pod(pod)


async def test_host_network_pod_has_the_hosts_namespaces(world: World, busybox: str) -> None:
    """A pod on the host's network has its network and host name, and needs no namespace of ours."""
    pod = await world.make_pod(host_network=True)
    printed = await world.text(pod, busybox, "sh", "-c", "readlink /proc/self/ns/net; readlink /proc/self/ns/uts")
    assert printed.split() == [os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/uts")]
    await world.remove_pod(pod)


async def test_host_ipc_and_pid(world: World, busybox: str) -> None:
    """NODE means the host's namespace, for IPC and PIDs."""
    node = NamespaceOptions(ipc=NamespaceMode.NODE, pid=NamespaceMode.NODE)
    pod = await world.make_pod(pod_spec(security=PodSecurity(namespaces=node)))
    script = "readlink /proc/self/ns/ipc; readlink /proc/self/ns/pid"
    printed = await world.text(pod, busybox, "sh", "-c", script, security=security(namespaces=node))
    assert printed.split() == [os.readlink("/proc/self/ns/ipc"), os.readlink("/proc/self/ns/pid")]
    await world.remove_pod(pod)


async def test_ipc_sysctls_are_set_for_the_pod(world: World, busybox: str) -> None:
    """Sysctls of the IPC namespace hold in every container of the pod."""
    spec = pod_spec(sysctls={"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100", "net.ipv4.ip_forward": "1"})
    pod = await world.make_pod(spec)
    paths = ("/proc/sys/kernel/shm_rmid_forced", "/proc/sys/fs/mqueue/msg_max")
    assert (await world.text(pod, busybox, "cat", *paths)).split() == ["1", "100"]
    await world.remove_pod(pod)


@pytest.mark.parametrize("name", ["kernel.hostname", "vm.swappiness", "kernel.core_pattern", "kernel.shm_x+net.y"])
async def test_sysctl_outside_the_pods_namespaces_is_refused(world: World, name: str) -> None:
    """No sysctl of the host can be reached through a pod."""
    with pytest.raises(InvalidRequest, match="does not belong"):
        await world.make_pod(pod_spec(sysctls={name: "1"}))


async def test_user_namespace_is_refused(world: World) -> None:
    """Docker has no user namespaces per pod; the refusal says what to do."""
    spaces = NamespaceOptions(user=UserNamespace(mode=NamespaceMode.POD))
    with pytest.raises(NotSupported, match="hostUsers"):
        await world.make_pod(pod_spec(security=PodSecurity(namespaces=spaces)))


async def test_create_pod_again_after_a_crash_replaces_what_was_left(world: World) -> None:
    """A daemon that died between the act and its record may create the pod again, with empty facts."""
    pod = await world.make_pod()
    again = await world.runtime.create_pod(replace(pod, facts={}))
    assert again.facts["engine_id"] != pod.facts["engine_id"]
    assert not Path(f"/proc/{pod.facts['pid']}").exists() or status_of(pod.facts["pid"])["State"].startswith("Z")
    await world.remove_pod(pod)


async def test_stop_and_remove_are_idempotent(world: World, busybox: str) -> None:
    """Stop and remove take all containers along, and succeed for what is gone or never was."""
    pod = await world.make_pod()
    container = await world.run(pod, busybox, container_spec("sleep", "1000"))
    for _ in range(2):
        await world.runtime.stop_pod(pod)
    snapshot = await world.runtime.inspect((pod,), (container,))
    assert (snapshot.pods[0].liveness, snapshot.containers[0].liveness) == (Liveness.EXITED, Liveness.EXITED)
    for _ in range(2):
        await world.runtime.remove_pod(pod)
    snapshot = await world.runtime.inspect((pod,), (container,))
    assert (snapshot.pods[0].liveness, snapshot.containers[0].liveness) == (Liveness.ABSENT, Liveness.ABSENT)
    await world.runtime.stop_container(container, 5)
    await world.runtime.remove_container(container)
    await world.remove_pod(pod)


async def test_death_of_the_pause_is_seen(world: World) -> None:
    """A pause that somebody kills makes the pod not ready, by an event."""
    pod = await world.make_pod()
    os.kill(pod.facts["pid"], signal.SIGKILL)

    def died() -> bool:
        facts = [fact for fact in world.seen if isinstance(fact, ObservedPod) and fact.id == pod.id]
        return any(fact.liveness is Liveness.EXITED and fact.reason == "PauseExited" for fact in facts)

    async with asyncio.timeout(DEADLINE_S), world.news:
        await world.news.wait_for(died)
    await world.remove_pod(pod)


async def test_unknown_namespace_fails_clearly(world: World) -> None:
    """A namespace file that is none cannot hold a pod, and nothing is left behind."""
    pod = await world.make_pod()
    assert pod.attachment is not None
    file = world.folder / "no-namespace"
    file.touch()
    broken = replace(pod, id=type(pod.id)("f" * 64), attachment=replace(pod.attachment, netns_path=str(file)))
    with pytest.raises(Exception, match="could not be entered"):
        await world.runtime.create_pod(broken)
    await world.runtime.remove_pod(broken)
    await world.remove_pod(pod)


async def test_only_our_labels_reach_the_engine(world: World, busybox: str) -> None:
    """Pod labels and annotations never become labels of the engine, where other tools would act on them."""
    pod = await world.make_pod(pod_spec(labels={"com.docker.stack": "x"}, annotations={"traefik.enable": "true"}))
    container = await world.make(pod, busybox, container_spec("true", labels={"a": "b"}, annotations={"c": "d"}))
    for name in (f"cri_{pod.id}", f"cri_{container.id}"):
        labels = world.engine.inspect(name)["Config"]["Labels"]
        assert {key.partition(".")[0] for key in labels} == {"cri-dispatcher"}
        assert labels["cri-dispatcher.node"] == world.services.node_uuid
    await world.remove_pod(pod)


async def test_objects_of_another_node_are_not_touched(world: World) -> None:
    """What carries another node's uuid, or none, appears in no snapshot."""
    world.engine.request(
        "POST",
        "/containers/create?name=foreign",
        {"Image": (world.engine.images()[0]["Id"]), "Cmd": ["x"], "Labels": {"cri-dispatcher.node": "another"}},
    )
    world.snapshots.clear()
    await world.restart_runtime()
    async with asyncio.timeout(DEADLINE_S), world.news:
        await world.news.wait_for(lambda: world.snapshots)
    assert "another" not in {
        world.engine.inspect(f"cri_{fact.id}")["Config"]["Labels"]["cri-dispatcher.node"]
        for fact in world.snapshots[-1].containers
    }
    assert world.engine.inspect("foreign")["State"]["Status"] == "created"
    world.engine.request("DELETE", "/containers/foreign?force=1")
