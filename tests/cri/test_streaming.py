"""exec, attach and port-forward over the URLs that the endpoint hands out."""

from __future__ import annotations

import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.child import wait_until
from tests.lab.client import ContainerHandle, CriClient, Pod, pod_namespaces, refused
from tests.lab.images import HTTPD
from tests.lab.registry import free_port
from tests.lab.streams import Forwarding, RemoteCommand


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
