"""Containers: life cycle, attributes, exec, stats, logs, volumes."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.child import wait_until
from tests.lab.client import ContainerHandle, CriClient, Pod, refused, unique
from tests.lab.images import BUSYBOX

RUNNING = pb.ContainerStateValue(state=pb.CONTAINER_RUNNING)
CREATED = pb.ContainerStateValue(state=pb.CONTAINER_CREATED)


def test_a_created_container_is_listed_and_not_started(cri: CriClient, pod: Pod) -> None:
    container = pod.create()
    status = container.status()
    assert status.state == pb.CONTAINER_CREATED
    assert status.created_at > 0
    assert status.started_at == 0
    assert [listed.id for listed in cri.containers(id=container.id, state=CREATED)] == [container.id]
    assert not cri.containers(id=container.id, state=RUNNING)


def test_metadata_labels_and_annotations_are_kept_as_they_came(cri: CriClient, pod: Pod) -> None:
    labels, annotations = {"k": "v", "io.kubernetes.container.name": "x"}, {"a": "b\nc", "huge": "y" * 5000}
    container = pod.create(labels=labels, annotations=annotations, attempt=2)
    (listed,) = cri.containers(id=container.id)
    for view in (container.status(), listed):
        assert view.metadata == container.config.metadata
        assert dict(view.labels) == labels
        assert dict(view.annotations) == annotations
    assert listed.pod_sandbox_id == pod.id


def test_a_started_container_runs(pod: Pod) -> None:
    container = pod.run()
    status = container.status()
    assert status.state == pb.CONTAINER_RUNNING
    assert status.started_at >= status.created_at
    assert status.finished_at == 0


def test_starting_twice_is_refused_and_harms_nothing(pod: Pod) -> None:
    container = pod.run()
    with refused():
        container.start()
    assert container.status().state == pb.CONTAINER_RUNNING


def test_a_stopped_container_has_exited_by_its_signal(pod: Pod) -> None:
    container = pod.run()
    began = time.monotonic()
    container.stop(grace_s=60)
    assert time.monotonic() - began < 30, "the signal did not reach the first process"
    status = container.status()
    assert status.state == pb.CONTAINER_EXITED
    assert status.exit_code == 143
    assert status.finished_at >= status.started_at > 0


def test_a_container_that_ignores_the_signal_is_killed_after_its_grace(pod: Pod) -> None:
    container = pod.run(command=["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"])
    container.wait_log(lambda text: "ready" in text)
    container.stop(grace_s=1)
    assert container.status().exit_code == 137


@pytest.mark.parametrize("state", ["created", "running", "stopped"])
def test_a_container_is_removed_in_any_state(cri: CriClient, pod: Pod, state: str) -> None:
    container = pod.create() if state == "created" else pod.run()
    if state == "stopped":
        container.stop()
    container.remove()
    assert not cri.containers(id=container.id)
    with refused(grpc.StatusCode.NOT_FOUND):
        container.status()


def test_exit_codes_and_reasons(pod: Pod) -> None:
    good, bad = pod.run_to_end("true").status(), pod.run_to_end("sh", "-c", "exit 7").status()
    assert (good.exit_code, good.reason) == (0, "Completed")
    assert (bad.exit_code, bad.reason) == (7, "Error")


def test_a_program_that_does_not_exist_fails_the_start_and_leaves_the_reason(pod: Pod) -> None:
    container = pod.create(command=["/no/such/program"])
    with refused():
        container.start()
    status = container.status()
    assert status.state == pb.CONTAINER_EXITED
    assert status.exit_code in (127, 128)
    assert status.reason in ("StartError", "ContainerCannotRun")


def test_a_container_that_ends_at_once_was_started_well(pod: Pod) -> None:
    container = pod.create(command=["true"])
    container.start()
    container.wait_exited()


# --------------------------------------------------------------------------------------------------------------- exec


def test_exec_brings_output_and_code(running: ContainerHandle) -> None:
    ran = running.exec("echo", "-n", "hello")
    assert (ran.stdout, ran.stderr, ran.exit_code) == ("hello", "", 0)
    failed = running.exec("sh", "-c", "echo out; echo err >&2; exit 3")
    assert (failed.stdout, failed.stderr, failed.exit_code) == ("out\n", "err\n", 3)


def test_exec_past_its_timeout_is_killed_and_says_so(pod: Pod) -> None:
    container = pod.run()
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        container.exec("sleep", "4321", timeout_s=1)
    wait_until(lambda: container.exec("pgrep", "-f", "sleep 4321").exit_code == 1, timeout_s=10, what="sleep lives on")


def test_exec_in_a_container_that_does_not_run_is_refused(pod: Pod) -> None:
    container = pod.create()
    with refused():
        container.exec("true")
    with refused(grpc.StatusCode.NOT_FOUND):
        ContainerHandle(pod, "f" * 64, container.config).exec("true")


# -------------------------------------------------------------------------------------------------------------- stats


def need_stats(cri: CriClient) -> None:
    if cri.unimplemented("ListContainerStats"):
        pytest.skip("the endpoint has no ListContainerStats")


def stats(cri: CriClient, **filters: Any) -> dict[str, pb.ContainerStats]:
    request = pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(**filters) if filters else None)
    return {found.attributes.id: found for found in cri.rpc("ListContainerStats", request).stats}


def test_stats_of_one_container_are_complete(cri: CriClient, running: ContainerHandle) -> None:
    need_stats(cri)
    found = cri.rpc("ContainerStats", pb.ContainerStatsRequest(container_id=running.id)).stats
    assert found.attributes.id == running.id
    assert found.attributes.metadata.name == running.config.metadata.name
    assert found.cpu.timestamp > 0
    assert found.memory.timestamp > 0
    assert found.memory.working_set_bytes.value > 0


def test_stats_are_listed_by_id_and_by_pod(cri: CriClient, pod: Pod) -> None:
    need_stats(cri)
    one, two = pod.run(), pod.run()
    assert set(stats(cri, id=one.id)) == {one.id}
    assert {one.id, two.id} <= set(stats(cri, pod_sandbox_id=pod.id))


def test_stats_without_a_filter_list_all_running_containers(cri: CriClient, pod: Pod) -> None:
    need_stats(cri)
    made = {pod.run().id for _ in range(3)}
    assert made <= set(stats(cri))


def test_stats_are_listed_by_label(cri: CriClient, pod: Pod) -> None:
    need_stats(cri)
    mark = unique("mark")
    one, other = pod.run(labels={"mark": mark, "n": "1"}), pod.run(labels={"mark": mark, "n": "2"})
    assert set(stats(cri, label_selector={"mark": mark})) == {one.id, other.id}
    assert set(stats(cri, label_selector={"mark": mark, "n": "1"})) == {one.id}
    assert not stats(cri, label_selector={"mark": mark, "n": "3"})


# ------------------------------------------------------------------------------------------------------------ volumes


@pytest.mark.parametrize("through_link", [False, True], ids=["folder", "symlink"])
def test_a_host_folder_is_seen_where_it_is_mounted(pod: Pod, tmp_path: Path, through_link: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "from-host").write_text("host")
    source = folder
    if through_link:
        source = tmp_path / "link"
        source.symlink_to(folder)
    container = pod.run(mounts=[pb.Mount(host_path=str(source), container_path="/mnt/it")])
    assert container.sh("cat /mnt/it/from-host; echo back > /mnt/it/from-inside") == "host"
    assert (folder / "from-inside").read_text() == "back\n"
    (mount,) = container.status().mounts
    assert mount == container.config.mounts[0]


def test_a_single_file_is_mounted_and_its_writes_are_on_the_host(pod: Pod, tmp_path: Path) -> None:
    """As the kubelet does with the termination log."""
    log = tmp_path / "termination-log"
    log.touch()
    mounts = [pb.Mount(host_path=str(log), container_path="/dev/termination-log")]
    pod.run_to_end("sh", "-c", "echo last words > /dev/termination-log", mounts=mounts)
    assert log.read_text() == "last words\n"


def test_a_missing_host_path_is_refused(pod: Pod, tmp_path: Path) -> None:
    with refused():
        pod.create(mounts=[pb.Mount(host_path=str(tmp_path / "absent"), container_path="/mnt/it")])
    assert not (tmp_path / "absent").exists()


def test_a_device_is_given(pod: Pod) -> None:
    device = pb.Device(host_path="/dev/full", container_path="/dev/mine", permissions="rw")
    container = pod.run(devices=[device])
    assert container.sh("test -c /dev/mine && head -c 1 /dev/mine | wc -c") == "1"


# --------------------------------------------------------------------------------------------------------------- logs


def test_both_streams_are_logged_in_the_format_of_the_kubelet(pod: Pod) -> None:
    container = pod.run_to_end("sh", "-c", "echo hello world; echo; echo oops >&2; printf tail")
    status = container.status()
    assert status.log_path == str(container.log_path)
    wait_until(lambda: len(container.log_lines()) == 4, timeout_s=10, what="the log is not complete")
    for line in container.log_lines():
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,9}(Z|[+-]\d\d:\d\d)", line.time)
    assert container.output("stdout") in {"hello world\n\ntail", "hello world\n\ntail\n"}
    assert container.output("stderr") == "oops\n"


def test_a_long_line_is_cut_into_parts_that_glue_together(pod: Pod) -> None:
    container = pod.run_to_end("sh", "-c", "head -c 40000 /dev/zero | tr '\\0' x; echo end")
    text = container.wait_log(lambda text: text.endswith("\n"))
    assert text == "x" * 40000 + "end\n"
    assert any(line.partial for line in container.log_lines())


def test_a_reopened_log_goes_on_in_a_new_file(cri: CriClient, pod: Pod) -> None:
    container = pod.run(command=["sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done"])
    container.wait_log(lambda text: "line 2" in text)
    old = container.log_path.with_suffix(".old")
    container.log_path.rename(old)
    cri.rpc("ReopenContainerLog", pb.ReopenContainerLogRequest(container_id=container.id))
    assert container.log_path.exists()
    frozen = old.read_bytes()
    container.wait_log(lambda text: text.count("line") > 3)
    assert old.read_bytes() == frozen
    container.stop()
    numbers = [int(part) for part in re.findall(r"line (\d+)", (frozen + container.log_path.read_bytes()).decode())]
    assert numbers == list(range(len(numbers)))


def test_the_log_of_a_stopped_container_is_not_reopened(cri: CriClient, pod: Pod) -> None:
    container = pod.run_to_end("true")
    container.log_path.unlink(missing_ok=True)
    with refused():
        cri.rpc("ReopenContainerLog", pb.ReopenContainerLogRequest(container_id=container.id))
    assert not container.log_path.exists()


def test_a_removed_container_leaves_its_log(pod: Pod) -> None:
    container = pod.run_to_end("echo", "kept")
    container.wait_log(lambda text: text == "kept\n")
    container.remove()
    assert container.output() == "kept\n"


# ------------------------------------------------------------------------------------------------------------ process


def test_command_args_environment_and_folder_follow_the_image(pod: Pod) -> None:
    image = "registry.k8s.io/lab/process:1"
    assert output_of(pod, image=image, command=()) == "entrypoint cmd\n"
    assert output_of(pod, image=image, command=(), args=["x", "y"]) == "entrypoint x y\n"
    script = "echo $0 $FROM_IMAGE $SHARED $MINE; pwd"
    text = output_of(pod, image=image, command=["sh", "-c", script], envs={"SHARED": "config", "MINE": "1"})
    assert text == "sh yes config 1\n/var/www\n"
    text = output_of(pod, image=image, command=["sh", "-c", "pwd", "name"], args=["ignored"], working_dir="/tmp")
    assert text == "/tmp\n"


def test_no_command_anywhere_is_refused(pod: Pod) -> None:
    with refused():
        pod.run(image="registry.k8s.io/lab/empty:1", command=())


def test_the_stop_signal_of_the_config_comes_before_that_of_the_image(pod: Pod) -> None:
    script = "trap 'echo usr1; exit 1' USR1; trap 'echo usr2; exit 2' USR2; echo ready; while :; do sleep 0.05; done"
    image = "registry.k8s.io/lab/process:1"
    by_image = pod.run(image=image, command=["sh", "-c", script])
    by_config = pod.run(image=image, command=["sh", "-c", script], stop_signal=pb.SIGNAL_SIGUSR2)
    for container in (by_image, by_config):
        container.wait_log(lambda text: "ready" in text)
        container.stop(grace_s=20)
    assert by_image.status().exit_code == 1
    assert by_config.status().exit_code == 2


def test_an_image_that_is_not_here_is_refused_and_never_pulled(cri: CriClient, pod: Pod) -> None:
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=unique("c")), image=pb.ImageSpec(image="registry.k8s.io/lab/absent:1")
    )
    request = pb.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
    with refused(grpc.StatusCode.NOT_FOUND):
        cri.rpc("CreateContainer", request)


def test_container_lists_filter_by_pod_state_and_label_together(cri: CriClient, pod: Pod) -> None:
    mark = unique("mark")
    made, started = pod.create(labels={"mark": mark}), pod.run(labels={"mark": mark})
    with cri.run_pod() as other:
        elsewhere = other.create(labels={"mark": mark})
        everywhere = {found.id for found in cri.containers(label_selector={"mark": mark})}
        assert everywhere == {made.id, started.id, elsewhere.id}
        here = {found.id for found in cri.containers(pod_sandbox_id=pod.id, label_selector={"mark": mark})}
        assert here == {made.id, started.id}
        created = {found.id for found in cri.containers(state=CREATED, label_selector={"mark": mark})}
        assert created == {made.id, elsewhere.id}
    assert started.id in {found.id for found in cri.containers()}


# ---------------------------------------------------------------------------------------------------------- resources


def test_memory_beyond_the_limit_is_an_oom_kill(pod: Pod) -> None:
    limit = 15 << 20
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=limit, memory_swap_limit_in_bytes=limit)
    container = pod.run_to_end("sh", "-c", "dd if=/dev/zero of=/dev/null bs=20M", resources=resources)
    status = container.status()
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


def test_limits_are_enforced_by_the_cgroup_and_told_in_the_status(cri: CriClient, pod: Pod) -> None:
    resources = pb.LinuxContainerResources(
        cpu_period=100_000, cpu_quota=50_000, cpu_shares=512, memory_limit_in_bytes=64 << 20
    )
    container = pod.run(resources=resources)
    told = container.status().resources.linux
    assert (told.cpu_period, told.cpu_quota, told.memory_limit_in_bytes) == (100_000, 50_000, 64 << 20)
    update = pb.LinuxContainerResources(memory_limit_in_bytes=96 << 20)
    cri.rpc("UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id=container.id, linux=update))
    told = container.status().resources.linux
    assert (told.memory_limit_in_bytes, told.cpu_quota) == (96 << 20, 50_000)


def test_an_unprivileged_pod_takes_no_privileged_container(pod: Pod) -> None:
    with refused():
        pod.create(security=pb.LinuxContainerSecurityContext(privileged=True))


def output_of(pod: Pod, **fields: Any) -> str:
    container = pod.run(**fields)
    container.wait_exited()
    return container.wait_log(lambda text: text.endswith("\n"))


def test_ids_are_not_shared_by_names(pod: Pod) -> None:
    """The same name is refused or brings the same container: (name, attempt) is unique in a pod."""
    first = pod.create(name="fixed", image=BUSYBOX)
    try:
        second = pod.create(name="fixed", image=BUSYBOX).id
    except grpc.RpcError:
        second = first.id
    assert second == first.id
    assert pod.create(name="fixed", attempt=1).id != first.id
    assert first.log_path.name == "fixed_0.log"
