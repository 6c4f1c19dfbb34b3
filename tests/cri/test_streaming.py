"""exec, attach and port-forward over the URLs that the endpoint hands out."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import time
from collections.abc import Iterator

import grpc
import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.child import wait_until
from tests.lab.client import ContainerHandle, CriClient, Pod, pod_namespaces, refused
from tests.lab.images import HTTPD
from tests.lab.registry import free_port
from tests.lab.streams import Forwarding, RemoteCommand, run_websocket_command


def exec_url(container: ContainerHandle, *command: str, **flags: bool) -> str:
    request = pb.ExecRequest(container_id=container.id, cmd=command, **flags)
    url: str = container.pod.client.rpc("Exec", request).url
    return url


def forward_url(pod: Pod) -> str:
    url: str = pod.client.rpc("PortForward", pb.PortForwardRequest(pod_sandbox_id=pod.id)).url
    return url


def exit_code(status: dict[str, object]) -> str:
    causes = status["details"]["causes"]  # type: ignore[index]
    return str(next(cause["message"] for cause in causes if cause["reason"] == "ExitCode"))


def test_exec_brings_both_streams_and_success(running: ContainerHandle) -> None:
    url = exec_url(running, "sh", "-c", "echo -n hello; echo -n oops >&2", stdout=True, stderr=True)
    with RemoteCommand(url) as command:
        assert command.read_all(command.stdout) == b"hello"
        assert command.read_all(command.stderr) == b"oops"
        assert command.result()["status"] == "Success"


def test_exec_tells_the_exit_code(running: ContainerHandle) -> None:
    with RemoteCommand(exec_url(running, "sh", "-c", "exit 7", stdout=True, stderr=True)) as command:
        status = dict(command.result())
    assert status["status"] == "Failure"
    assert status["reason"] == "NonZeroExitCode"
    assert exit_code(status) == "7"


def test_exec_passes_standard_input_and_its_end(running: ContainerHandle) -> None:
    with RemoteCommand(exec_url(running, "cat", stdin=True, stdout=True, stderr=True), stdin=True) as command:
        command.send(command.stdin, b"some ")
        assert command.read_until(command.stdout, b"some ")
        command.send(command.stdin, b"bytes", fin=True)
        assert command.read_all(command.stdout) == b"some bytes"
        assert command.result()["status"] == "Success"


def test_exec_on_a_terminal_has_its_size_and_takes_input(running: ContainerHandle) -> None:
    url = exec_url(running, "sh", tty=True, stdin=True, stdout=True)
    with RemoteCommand(url, stdin=True, tty=True) as command:
        command.set_size(77, 33)
        command.send(command.stdin, b"echo he''llo; tty\n")
        assert b"hello" in command.read_until(command.stdout, b"/dev/pts/")
        command.send(command.stdin, b"exit 3\n")
        assert exit_code(dict(command.result())) == "3"


def test_attach_reaches_the_first_process_and_ends_with_it(pod: Pod) -> None:
    container = pod.run(command=["/bin/sh"], stdin=True, stdin_once=True)
    request = pb.AttachRequest(container_id=container.id, stdin=True, stdout=True, stderr=True)
    with RemoteCommand(pod.client.rpc("Attach", request).url, stdin=True) as session:
        session.send(session.stdin, b"echo -n hello\n")
        assert session.read_until(session.stdout, b"hello") == b"hello"
        session.send(session.stdin, b"", fin=True)
        assert session.read_all(session.stdout) == b"hello"
        assert session.result()["status"] == "Success"
    container.wait_exited()
    container.wait_log(lambda text: text.rstrip("\n") == "hello")


def get(forwarding: Forwarding, port: int) -> bytes:
    data, error = forwarding.connect(port)
    forwarding.send(data, b"GET / HTTP/1.0\r\n\r\n")
    answer = forwarding.read_all(data)
    assert forwarding.read_all(error) == b""
    return answer


def test_a_port_is_forwarded_for_many_connections(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        web = pod.run(image=HTTPD, command=())
        wait_until(lambda: ":80 " in web.sh("netstat -ltn"), timeout_s=20, what="the web server does not listen")
        with Forwarding(forward_url(pod)) as forwarding:
            for _connection in range(5):
                assert b"It works!" in get(forwarding, 80)


def test_a_port_where_nobody_listens_is_an_error_of_that_connection(cri: CriClient, pod: Pod) -> None:
    with Forwarding(forward_url(pod)) as forwarding:
        _data, error = forwarding.connect(9)
        assert forwarding.read_all(error)


def test_a_port_is_forwarded_into_the_network_of_the_host(cri: CriClient) -> None:
    port = free_port()
    security = pb.LinuxSandboxSecurityContext(namespace_options=pod_namespaces(network=pb.NODE))
    with cri.run_pod(security=security, hostname="") as pod:
        script = (
            f"mkdir -p /tmp/www; echo host page > /tmp/www/index.html; exec httpd -f -p 127.0.0.1:{port} -h /tmp/www"
        )
        web = pod.run(command=["sh", "-c", script])
        wait_until(lambda: f":{port} " in web.sh("netstat -ltn"), timeout_s=20, what="the web server does not listen")
        with Forwarding(forward_url(pod)) as forwarding:
            assert b"host page" in get(forwarding, port)


def test_a_url_works_once(running: ContainerHandle) -> None:
    url = exec_url(running, "true", stdout=True, stderr=True)
    with RemoteCommand(url) as command:
        command.result()
    with pytest.raises(ConnectionError, match="404"):
        RemoteCommand(url)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="no stream"),
        pytest.param({"tty": True, "stdout": True, "stderr": True}, id="tty with stderr"),
    ],
)
def test_impossible_streams_are_refused(running: ContainerHandle, flags: dict[str, bool]) -> None:
    with refused():
        exec_url(running, "true", **flags)


# ------------------------------------------------------------------------------------------------------------ much data
def blocks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 32768):
        yield data[start : start + 32768]


@pytest.mark.parametrize("transport", ["spdy", "websocket"])
def test_64_mib_go_through_standard_input_and_back(running: ContainerHandle, transport: str) -> None:
    data = os.urandom(1 << 20) * 64
    url = exec_url(running, "cat", stdin=True, stdout=True, stderr=True)
    if transport == "spdy":
        with RemoteCommand(url, stdin=True) as command:
            command.feed(command.stdin, blocks(data))
            found = command.read_all(command.stdout)
            assert command.result()["status"] == "Success"
    else:
        status, found = run_websocket_command(url, blocks(data))
        assert status["status"] == "Success"
    assert hashlib.sha256(found).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("transport", ["spdy", "websocket"])
def test_a_tar_stream_goes_both_ways(pod: Pod, transport: str) -> None:
    """As `kubectl cp` does it."""
    container = pod.run()
    files = {f"copied/file {number}": os.urandom(1 + 997 * number) for number in range(100)}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    def run(*command: str, content: bytes) -> bytes:
        url = exec_url(container, *command, stdin=True, stdout=True, stderr=True)
        if transport == "spdy":
            with RemoteCommand(url, stdin=True) as session:
                session.feed(session.stdin, blocks(content))
                found = session.read_all(session.stdout)
                assert session.result()["status"] == "Success"
                return found
        status, output = run_websocket_command(url, blocks(content))
        assert status["status"] == "Success"
        return output

    assert run("tar", "-C", "/tmp", "-xf", "-", content=packed.getvalue()) == b""
    back = run("tar", "-C", "/tmp", "-cf", "-", "copied", content=b"")
    with tarfile.open(fileobj=io.BytesIO(back)) as archive:
        found = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        assert {name: file.read() for name, file in found.items() if file is not None} == files


def test_a_slow_reader_gets_all_that_was_written(running: ContainerHandle) -> None:
    """The command ends long before its output was read; not a byte of it is lost."""
    script = "i=0; while [ $i -lt 150000 ]; do i=$((i+1)); echo line $i; done; exit 5"
    with RemoteCommand(exec_url(running, "sh", "-c", script, stdout=True, stderr=True)) as command:
        command.read_until(command.stdout, b"line 10000\n")
        time.sleep(8)  # the time that passes is what this is about: engines cut the output two seconds after an exit
        found = command.read_all(command.stdout)
        assert found == b"".join(b"line %d\n" % number for number in range(1, 150_001))
        assert exit_code(dict(command.result())) == "5"


# --------------------------------------------------------------------------------------------------------------- attach
def attach_url(container: ContainerHandle, **flags: bool) -> str:
    url: str = container.pod.client.rpc("Attach", pb.AttachRequest(container_id=container.id, **flags)).url
    return url


def test_the_end_of_an_attached_input_ends_that_of_the_process_only_with_stdin_once(pod: Pod) -> None:
    """Without it, the next attachment goes on where the last one ended; output follows until the client leaves."""
    script = "while read line; do echo got $line; done; echo ended"
    container = pod.run(command=["sh", "-c", script], stdin=True, stdin_once=False)
    with RemoteCommand(attach_url(container, stdin=True, stdout=True, stderr=True), stdin=True) as first:
        first.send(first.stdin, b"one\n", fin=True)
        first.read_until(first.stdout, b"got one\n")
        with RemoteCommand(attach_url(container, stdin=True, stdout=True, stderr=True), stdin=True) as second:
            second.send(second.stdin, b"two\n")
            second.read_until(second.stdout, b"got two\n")
            assert first.read_until(first.stdout, b"got two\n") == b"got one\ngot two\n"
            assert b"ended" not in second.read_until(second.stdout, b"two")
    assert container.status().state == pb.CONTAINER_RUNNING
    with RemoteCommand(attach_url(container, stdin=True, stdout=True, stderr=True), stdin=True) as third:
        third.send(third.stdin, b"three\n")
        third.read_until(third.stdout, b"got three\n")


def test_with_stdin_once_the_end_of_the_input_reaches_the_process(pod: Pod) -> None:
    script = "while read line; do echo got $line; done; echo ended; exit 4"
    container = pod.run(command=["sh", "-c", script], stdin=True, stdin_once=True)
    with RemoteCommand(attach_url(container, stdin=True, stdout=True, stderr=True), stdin=True) as session:
        session.send(session.stdin, b"one\n", fin=True)
        assert session.read_all(session.stdout) == b"got one\nended\n"
        assert exit_code(dict(session.result())) == "4"


# --------------------------------------------------------------------------------------------------------- port-forward
def test_fifty_connections_at_once_over_one_session(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        web = pod.run(image=HTTPD, command=())
        wait_until(lambda: ":80 " in web.sh("netstat -ltn"), timeout_s=20, what="the web server does not listen")
        with Forwarding(forward_url(pod)) as forwarding:
            opened = [forwarding.connect(80) for _ in range(50)]
            for data, _error in opened:
                forwarding.send(data, b"GET / HTTP/1.0\r\n")
            for data, _error in reversed(opened):
                forwarding.send(data, b"\r\n")
            for data, error in opened:
                assert b"It works!" in forwarding.read_all(data)
                assert forwarding.read_all(error) == b""


# ------------------------------------------------------------------------------------------------------- hostile peers
def sleepers(container: ContainerHandle, seconds: int) -> bool:
    return f"sleep {seconds}" in container.sh("ps -o args")


def test_a_client_that_leaves_with_its_input_unread_ends_its_command(running: ContainerHandle) -> None:
    with RemoteCommand(exec_url(running, "sleep", "4242", stdin=True, stdout=True, stderr=True), stdin=True) as session:
        wait_until(lambda: sleepers(running, 4242), timeout_s=20, what="the command does not run")
        feeding = session.feed(session.stdin, (b"x" * 32768 for _ in range(2000)))
        feeding.join(timeout=2)
        assert feeding.is_alive(), "64 MB were taken though nobody reads them"
        session.break_off()
        wait_until(lambda: not sleepers(running, 4242), timeout_s=30, what="the command outlives its client")


def test_endless_output_that_nobody_reads_ends_with_its_client(running: ContainerHandle) -> None:
    with RemoteCommand(exec_url(running, "yes", "nobody-reads", stdout=True, stderr=True)) as session:
        session.read_until(session.stdout, b"nobody-reads\n")
        assert "nobody-reads" in running.sh("ps -o args | grep -v grep")
        session.break_off()
        wait_until(
            lambda: "yes nobody-reads" not in running.sh("ps -o args | grep -v grep"),
            timeout_s=30,
            what="the command outlives its client",
        )


def test_a_child_that_holds_the_output_does_not_hold_the_session(running: ContainerHandle) -> None:
    with RemoteCommand(exec_url(running, "sh", "-c", "sleep 4343 & echo done", stdout=True, stderr=True)) as session:
        assert session.read_all(session.stdout) == b"done\n"
        assert session.result()["status"] == "Success"
    running.sh("kill $(pidof sleep) 2>/dev/null; true")


def test_a_flood_of_sizes_ends_with_the_last_one(running: ContainerHandle) -> None:
    with RemoteCommand(exec_url(running, "sh", tty=True, stdin=True, stdout=True), stdin=True, tty=True) as session:
        for width in range(1, 3001):
            session.set_size(width, 40)
        wait_until(lambda: _size(session) == b"40 3000", timeout_s=20, what="the last size does not arrive")
        session.send(session.stdin, b"exit\n")
        assert session.result()["status"] == "Success"


def _size(session: RemoteCommand) -> bytes:
    mark = b"mark-%d" % time.monotonic_ns()
    session.send(session.stdin, b"stty size; echo ''" + mark + b"''\n")
    lines = session.read_until(session.stdout, b"\n" + mark).split(b"\n")
    return lines[lines.index(mark + b"\r") - 1].strip() if mark + b"\r" in lines else lines[-2].strip()


def test_tokens_that_nobody_uses_are_bounded_and_keep_nobody_out(running: ContainerHandle, pod: Pod) -> None:
    other = pod.run()
    granted = 0
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        for _ in range(2000):
            exec_url(other, "true", stdout=True, stderr=True)
            granted += 1
    assert 0 < granted <= 1000
    with RemoteCommand(exec_url(running, "true", stdout=True, stderr=True)) as command:
        assert command.result()["status"] == "Success"
