"""What a pod may tell the network plugins: arguments, capabilities, quantities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import InvalidRequest, PolicyRefused
from dispatcher.model import DnsConfig, PodId, PodMetadata, PodSpec, PortMapping, Protocol
from dispatcher_cni.arguments import join_arguments, make_arguments
from dispatcher_cni.capabilities import (
    EGRESS_BANDWIDTH,
    INGRESS_BANDWIDTH,
    IP_RANGES,
    IPS,
    MAC,
    AnnotationRules,
    Capabilities,
    make_capabilities,
    parse_pod_cidrs,
)
from dispatcher_cni.quantity import parse_quantity

POD = PodId("a" * 64)
EVERYWHERE = frozenset({"*"})
OPEN = AnnotationRules(bandwidth=EVERYWHERE, ips=EVERYWHERE, mac=EVERYWHERE, ip_ranges=EVERYWHERE)
ALL = {"portMappings", "bandwidth", "dns", "ipRanges", "mac", "ips", "cgroupPath", "io.kubernetes.cri.pod-annotations"}


def pod(name: str = "web-0", namespace: str = "default", uid: str = "uid-1", **changes: Any) -> PodSpec:
    """A pod as asked for."""
    return PodSpec(metadata=PodMetadata(name=name, namespace=namespace, uid=uid), **changes)


def wishes(
    spec: PodSpec, declared: set[str], *, rules: AnnotationRules = OPEN, pod_cidrs: tuple[str, ...] = ()
) -> Capabilities:
    """Work out the capabilities."""
    return make_capabilities(spec, rules=rules, pod_cidrs=pod_cidrs, declared=declared)


def annotated(annotations: Mapping[str, str], declared: set[str] = ALL) -> Mapping[str, Any]:
    """The arguments of a pod with annotations."""
    return wishes(pod(annotations=annotations), declared - {"io.kubernetes.cri.pod-annotations"}).arguments


# ---------------------------------------------------------------------------------------------------------- arguments
def test_arguments_are_those_that_kubernetes_plugins_read() -> None:
    """The order and the names are the ones in use everywhere."""
    assert join_arguments(make_arguments(POD, pod())) == (
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;"
        f"K8S_POD_INFRA_CONTAINER_ID={POD};K8S_POD_UID=uid-1"
    )


def test_absent_uid_is_left_out() -> None:
    """Clients other than the kubelet may have none."""
    assert "UID" not in join_arguments(make_arguments(POD, pod(uid="")))


@pytest.mark.parametrize("text", ["a;IP=10.0.0.1", "a=b", "a b", "a\n", "-a", "ä", "a/../b", "x" * 254, "a\0"])
@pytest.mark.parametrize("field", ["name", "namespace", "uid"])
def test_nothing_that_could_be_a_second_argument_passes(field: str, text: str) -> None:
    """The string has no quoting, so separators are refused wherever they come from."""
    with pytest.raises(InvalidRequest, match="cannot be handed to network plugins"):
        make_arguments(POD, pod(**{field: text}))


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_arguments_always_split_back(name: str, namespace: str, uid: str) -> None:
    """Whatever passes is exactly one argument each."""
    try:
        arguments = make_arguments(POD, pod(name=name, namespace=namespace, uid=uid))
    except InvalidRequest:
        return
    assert [tuple(part.split("=")) for part in join_arguments(arguments).split(";")] == list(arguments)


# ------------------------------------------------------------------------------------------------------- capabilities
def test_only_declared_capabilities_are_told() -> None:
    """A plugin hears what it asked for; a wish that none hears is returned, to be logged."""
    spec = pod(port_mappings=(PortMapping(container_port=80, host_port=8080),), dns=DnsConfig(servers=("1.2.3.4",)))
    found = wishes(spec, {"dns"})
    assert found.arguments == {"dns": {"servers": ["1.2.3.4"], "searches": [], "options": []}}
    assert found.unheard == ("portMappings",)
    assert wishes(pod(), set()).unheard == ()


def test_port_mappings() -> None:
    """Only published ports, each once, with the host address where one is given."""
    mappings = (
        PortMapping(container_port=80),
        PortMapping(container_port=80, host_port=8080),
        PortMapping(container_port=80, host_port=8080),
        PortMapping(container_port=53, host_port=53, protocol=Protocol.UDP, host_ip="::1"),
    )
    assert wishes(pod(port_mappings=mappings), {"portMappings"}).arguments["portMappings"] == [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "::1"},
    ]


@pytest.mark.parametrize(
    "mapping",
    [
        PortMapping(container_port=0, host_port=1),
        PortMapping(container_port=1, host_port=65536),
        PortMapping(container_port=1, host_port=-1),
        PortMapping(container_port=1, host_port=1, host_ip="localhost"),
        PortMapping(container_port=1, host_port=1, host_ip="fe80::1%;reboot"),
    ],
)
def test_impossible_port_mappings_are_refused(mapping: PortMapping) -> None:
    """Ports have 16 bits, and a host address is an address."""
    with pytest.raises(InvalidRequest):
        wishes(pod(port_mappings=(mapping,)), {"portMappings"})


def test_bandwidth() -> None:
    """Each direction on its own, in bits, with the burst that plugins accept."""
    burst = 2**31 - 1
    assert annotated({INGRESS_BANDWIDTH: "10M"})["bandwidth"] == {"ingressRate": 10_000_000, "ingressBurst": burst}
    assert annotated({INGRESS_BANDWIDTH: "1k", EGRESS_BANDWIDTH: "1P"})["bandwidth"] == {
        "ingressRate": 1000,
        "ingressBurst": burst,
        "egressRate": 10**15,
        "egressBurst": burst,
    }


def test_addresses_and_mac() -> None:
    """Values reach the plugin in one spelling."""
    assert annotated({IPS: "10.0.0.5, 10.0.0.6/24,FD00::0:5"})["ips"] == ["10.0.0.5", "10.0.0.6/24", "fd00::5"]
    assert annotated({MAC: "02:AA:bb:00:11:22"})["mac"] == "02:aa:bb:00:11:22"
    ranges = '[[{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.20", "gateway": "10.1.0.1"}]]'
    assert annotated({IP_RANGES: ranges})["ipRanges"] == [
        [{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.20", "gateway": "10.1.0.1"}]
    ]


@pytest.mark.parametrize(
    "annotations",
    [
        {INGRESS_BANDWIDTH: "fast"},
        {EGRESS_BANDWIDTH: "1"},
        {EGRESS_BANDWIDTH: "2P"},
        {EGRESS_BANDWIDTH: "-1M"},
        {IPS: ""},
        {IPS: "10.0.0.300"},
        {IPS: "fe80::1%eth0"},
        {IPS: "10.0.0.1;x"},
        {IPS: ",".join(["10.0.0.1"] * 17)},
        {MAC: "02:00:00:00:00"},
        {MAC: "01:00:5e:00:00:01"},
        {MAC: "00:00:00:00:00:00"},
        {MAC: "02:00:00:00:00:zz"},
        {IP_RANGES: "10.0.0.0/8"},
        {IP_RANGES: "[]"},
        {IP_RANGES: "[[]]"},
        {IP_RANGES: '[[{"subnet": "10.1.0.1/24"}]]'},
        {IP_RANGES: '[[{"subnet": "10.1.0.0/24", "gateway": "10.2.0.1"}]]'},
        {IP_RANGES: '[[{"subnet": "10.1.0.0/24", "dataDir": "/etc"}]]'},
        {IP_RANGES: '[[{"subnet": 7}]]'},
        {IP_RANGES: "[" * 100_000},
    ],
)
def test_values_of_annotations_are_typed(annotations: dict[str, str]) -> None:
    """A wrong value is refused with the annotation's name."""
    (key,) = annotations
    with pytest.raises(InvalidRequest, match=f"annotation {key} is wrong"):
        annotated(annotations)


@pytest.mark.parametrize(
    ("key", "value", "setting"),
    [(IPS, "10.0.0.5", "ips"), (MAC, "02:00:00:00:00:01", "mac"), (IP_RANGES, "[]", "ip_ranges")],
)
def test_annotations_work_in_listed_namespaces_only(key: str, value: str, setting: str) -> None:
    """Shipped: bandwidth everywhere, addresses nowhere. The refusal names the setting to change."""
    rules = AnnotationRules(ips=frozenset({"infra"}))
    with pytest.raises(PolicyRefused, match=f"plugins.cni.annotations.{setting}"):
        wishes(pod(annotations={key: value}), ALL, rules=rules)
    assert "bandwidth" in wishes(pod(annotations={INGRESS_BANDWIDTH: "1M"}), ALL, rules=rules).arguments
    infra = pod(namespace="infra", annotations={IPS: "10.0.0.5"})
    assert wishes(infra, ALL, rules=rules).arguments["ips"] == ["10.0.0.5"]


def test_wish_for_an_address_that_nobody_serves_is_refused() -> None:
    """The pod would run with another one."""
    with pytest.raises(InvalidRequest, match="has the capability ips"):
        annotated({IPS: "10.0.0.5"}, {"mac"})


def test_node_range_serves_where_the_pod_has_no_wish() -> None:
    """The node's range goes to plugins with ipRanges; an allowed annotation wins."""
    cidrs = parse_pod_cidrs("10.1.2.0/24, fd00:1::/64")
    assert wishes(pod(), {"ipRanges"}, pod_cidrs=cidrs).arguments == {
        "ipRanges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "fd00:1::/64"}]]
    }
    own = pod(annotations={IP_RANGES: '[[{"subnet": "10.9.0.0/24"}]]'})
    assert wishes(own, {"ipRanges"}, pod_cidrs=cidrs).arguments == {"ipRanges": [[{"subnet": "10.9.0.0/24"}]]}
    with pytest.raises(ValueError):
        parse_pod_cidrs("10.1.2.0/24,nonsense")


def test_plugin_that_asks_gets_all_annotations_and_the_cgroup() -> None:
    """What containerd's plugins rely on."""
    spec = pod(annotations={"a": "b"}, cgroup_parent="/kubepods/pod1")
    assert wishes(spec, {"io.kubernetes.cri.pod-annotations", "cgroupPath"}).arguments == {
        "cgroupPath": "/kubepods/pod1",
        "io.kubernetes.cri.pod-annotations": {"a": "b"},
    }


# ---------------------------------------------------------------------------------------------------------- quantities
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("10", 10),
        ("1k", 1000),
        ("10M", 10**7),
        ("1.5G", 1_500_000_000),
        ("1Ki", 1024),
        ("1.5Mi", 1_572_864),
        ("100m", 1),
        ("1001m", 2),
        ("2e3", 2000),
        ("2E3", 2000),
        ("1E", 10**18),
        ("1Ei", 2**60),
        (".5k", 500),
        ("5.", 5),
        ("1n", 1),
    ],
)
def test_quantities(text: str, value: int) -> None:
    """Kubernetes' notation, rounded up."""
    assert parse_quantity(text) == value


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "-1", "+1", "1K", "1ki", "1kB", "0x10", "1e", "1e100", "inf", "१", "1\n"]
)
def test_what_is_no_quantity(text: str) -> None:
    """Anything else is refused."""
    with pytest.raises(ValueError):
        parse_quantity(text)
