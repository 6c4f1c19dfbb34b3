"""The pod's network as its containers and the host see it."""

from __future__ import annotations

import pytest

from dispatcher.cri import api_pb2 as pb
from tests.cri.test_multi_container import answers
from tests.lab.child import wait_until
from tests.lab.client import CriClient
from tests.lab.images import HTTPD, NGINX
from tests.lab.registry import free_port


def test_the_resolver_is_configured_as_asked(cri: CriClient) -> None:
    dns = pb.DNSConfig(servers=["10.10.10.10"], searches=["google.com"], options=["ndots:8"])
    with cri.run_pod(dns_config=dns) as pod:
        text = pod.run().sh("cat /etc/resolv.conf")
    assert {"nameserver 10.10.10.10", "search google.com", "options ndots:8"} <= set(text.splitlines())


def test_the_host_name_is_set(cri: CriClient) -> None:
    with cri.run_pod(hostname="test-hostname") as pod:
        container = pod.run()
        assert container.sh("hostname") == "test-hostname"
        assert container.sh("cat /etc/hostname") == "test-hostname"


@pytest.mark.parametrize("image", [HTTPD, NGINX], indirect=True, ids=["httpd", "nginx"])
def test_a_container_port_is_reached_at_the_pods_address(cri: CriClient, image: str) -> None:
    with cri.run_pod(port_mappings=[pb.PortMapping(container_port=80)]) as pod:
        pod.run(image=image, command=())
        wait_until(lambda: answers(f"{pod.ip}:80"), timeout_s=20, what="no answer at the pod's address")


def test_a_host_port_leads_to_the_container_port_and_is_free_afterwards(cri: CriClient) -> None:
    port = free_port()
    with cri.run_pod(port_mappings=[pb.PortMapping(container_port=80, host_port=port)]) as pod:
        pod.run(image=HTTPD, command=())
        wait_until(lambda: answers(f"127.0.0.1:{port}"), timeout_s=20, what="no answer at the host port")
        pod.stop()
        assert not answers(f"127.0.0.1:{port}")


def test_pods_reach_each_other(cri: CriClient) -> None:
    with cri.run_pod() as server, cri.run_pod() as client:
        server.run(image=HTTPD, command=())
        shell = client.run()
        assert server.ip != client.ip
        wait_until(lambda: answers(f"{server.ip}:80"), timeout_s=20, what="no answer at the pod's address")
        assert "It works" in shell.sh(f"wget -q -O - http://{server.ip}/")


def test_the_loopback_device_is_up_and_the_address_is_on_the_pods_device(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        container = pod.run()
        assert "127.0.0.1" in container.sh("ifconfig lo")
        assert f"inet addr:{pod.ip} " in container.sh("ifconfig")


def test_all_containers_of_a_pod_have_its_address_also_after_one_was_replaced(cri: CriClient) -> None:
    with cri.run_pod() as pod:
        address = pod.ip
        for attempt in range(3):
            container = pod.run(name="replaced", attempt=attempt)
            assert f"inet addr:{address} " in container.sh("ifconfig")
            container.stop()
        assert pod.ip == address
