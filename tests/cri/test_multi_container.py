"""Several containers of one pod share its network and stay apart otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.child import wait_until
from tests.lab.client import ContainerHandle, CriClient, Pod
from tests.lab.http import request
from tests.lab.images import HTTPD


@pytest.fixture(scope="module")
def pair(cri: CriClient) -> Iterator[tuple[Pod, ContainerHandle, ContainerHandle]]:
    """A web server and a shell in one pod."""
    with cri.run_pod() as pod:
        web = pod.run(image=HTTPD, command=())
        shell = pod.run(command=["sh", "-c", "echo shell starts; exec sleep 1000"])
        yield pod, web, shell


def test_the_web_server_is_reached_from_the_host_and_from_its_neighbour(
    pair: tuple[Pod, ContainerHandle, ContainerHandle],
) -> None:
    pod, _web, shell = pair
    wait_until(lambda: answers(f"{pod.ip}:80"), timeout_s=20, what="the web server does not answer")
    assert "It works" in shell.sh("wget -q -O - http://127.0.0.1/")


def test_each_container_has_its_log(pair: tuple[Pod, ContainerHandle, ContainerHandle]) -> None:
    _pod, web, shell = pair
    assert web.wait_log(lambda text: "httpd" in text)
    assert shell.wait_log(lambda text: text == "shell starts\n")
    assert web.status().log_path != shell.status().log_path


def test_each_container_runs_commands(pair: tuple[Pod, ContainerHandle, ContainerHandle]) -> None:
    _pod, web, shell = pair
    assert web.sh("cat /www/index.html") == "<h1>It works!</h1>"
    assert shell.exec("test", "-e", "/www/index.html").exit_code == 1


def answers(address: str) -> bool:
    try:
        return request(address, "GET", "/", timeout_s=2).status == 200
    except OSError:
        return False
