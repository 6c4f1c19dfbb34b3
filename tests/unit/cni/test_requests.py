"""What plugins receive and answer: golden requests, results of every version, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import NetworkFailed
from dispatcher.model import Attachment, Interface, NetworkPlan, NetworkRoute, PodId, PodMetadata, PodSpec
from dispatcher_cni.arguments import make_arguments
from dispatcher_cni.conflist import parse_list
from dispatcher_cni.plan import AttachmentPlan
from dispatcher_cni.request import make_environment, make_gc_input, make_input, make_version_input
from dispatcher_cni.result import (
    Link,
    NamespaceFacts,
    make_attachment,
    parse_error,
    parse_success,
    parse_versions,
)

GOLDEN = Path(__file__).with_name("golden")
POD = PodId("c0ffee" + "0" * 58)
NETNS = "/run/dispatcher/netns/" + POD
NETWORK = parse_list((GOLDEN / "network.conflist").read_bytes(), source="/etc/cni/net.d/10-net.conflist")
PLAN = AttachmentPlan(
    container_id=POD,
    interface="eth0",
    netns_path=NETNS,
    network=NETWORK,
    arguments=make_arguments(POD, PodSpec(metadata=PodMetadata(name="web-0", namespace="default", uid="uid-1"))),
    capabilities={
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
        "bandwidth": {"ingressRate": 1000, "ingressBurst": 2147483647},
    },
    bin_dirs=("/opt/cni/bin", "/usr/lib/cni"),
)
RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [
        {"name": "cni0", "mac": "aa:aa:aa:aa:aa:aa"},
        {"name": "veth1", "mac": "bb:bb:bb:bb:bb:bb"},
        {"name": "eth0", "mac": "CC:CC:CC:CC:CC:CC", "sandbox": NETNS},
    ],
    "ips": [
        {"address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 2},
        {"address": "fd01::5/64", "gateway": "fd01::1", "interface": 2},
    ],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}, {"dst": "10.9.0.0/16", "gw": "10.1.0.9"}],
    "dns": {"nameservers": ["10.1.0.53"], "search": ["svc"], "options": ["ndots:5"]},
}


def matches_golden(name: str, data: bytes) -> bool:
    """Compare a request with its file, which is kept readable; the bytes must be compact and stable."""
    assert data == json.dumps(json.loads(data), ensure_ascii=False, separators=(",", ":")).encode()
    return bool(json.loads(data) == json.loads((GOLDEN / name).read_text()))


def test_requests_match_their_golden_files() -> None:
    """Name, version and the previous result are put in; each plugin hears of its own capabilities only."""
    first, second = NETWORK.plugins
    assert matches_golden("add-1.json", make_input(NETWORK, first, capabilities=PLAN.capabilities))
    assert matches_golden("add-2.json", make_input(NETWORK, second, capabilities=PLAN.capabilities, previous=RESULT))
    assert matches_golden("gc-1.json", make_gc_input(NETWORK, first, [(POD, "eth0")]))
    assert make_version_input("1.1.0") == b'{"cniVersion":"1.1.0"}'


def test_stale_runtime_fields_of_a_file_are_not_handed_on() -> None:
    """A file that somebody saved from a log may hold them."""
    plugin = {"type": "x", "prevResult": {"ips": []}, "runtimeConfig": {"mac": "no"}}
    assert json.loads(make_input(NETWORK, plugin)) == {"type": "x", "name": "net", "cniVersion": "1.0.0"}


def test_environment_is_exactly_what_the_specification_names() -> None:
    """Nothing of ours leaks into plugins, and a namespace that is gone is the empty path."""
    environment = make_environment("DEL", bin_dirs=PLAN.bin_dirs, plan=PLAN)
    assert environment == {
        "CNI_COMMAND": "DEL",
        "CNI_PATH": "/opt/cni/bin:/usr/lib/cni",
        "CNI_CONTAINERID": POD,
        "CNI_NETNS": NETNS,
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;"
        f"K8S_POD_INFRA_CONTAINER_ID={POD};K8S_POD_UID=uid-1",
    }
    assert make_environment("DEL", bin_dirs=(), plan=PLAN, netns_path="")["CNI_NETNS"] == ""
    assert make_environment("VERSION", bin_dirs=("/x",)) == {"CNI_COMMAND": "VERSION", "CNI_PATH": "/x"}


def test_plan_survives_storage() -> None:
    """The stored form is plain JSON and gives back an equal plan."""
    stored = PLAN.to_network_plan()
    content = json.loads(json.dumps(stored.content))
    assert content == stored.content
    assert content == json.loads((GOLDEN / "plan.json").read_text())
    again = NetworkPlan(plugin=stored.plugin, netns_path=stored.netns_path, content=content)
    assert AttachmentPlan.from_network_plan(again) == PLAN


@pytest.mark.parametrize("changes", [{"plugin": "other"}, {"content": {"schema": 2}}, {"content": {}}])
def test_plan_of_another_provider_or_a_newer_version_is_refused(changes: dict[str, Any]) -> None:
    """The error says who can detach the pod."""
    plan = NetworkPlan(**{"plugin": "cni", "netns_path": NETNS, "content": {"schema": 1}, **changes})
    with pytest.raises(NetworkFailed, match="start the version that attached it"):
        AttachmentPlan.from_network_plan(plan)


# -------------------------------------------------------------------------------------------------------------- results
def attachment(result: dict[str, Any], **facts: Any) -> Attachment:
    """The attachment that a result makes."""
    return make_attachment(result, netns_path=NETNS, interface="eth0", facts=NamespaceFacts(**facts))


def test_result_becomes_an_attachment() -> None:
    """Host-side interfaces are not the pod's; a route without a gateway uses that of its family."""
    assert attachment(RESULT) == Attachment(
        netns_path=NETNS,
        ips=("10.1.0.5", "fd01::5"),
        interfaces=(Interface(name="eth0", mac="cc:cc:cc:cc:cc:cc", addresses=("10.1.0.5/24", "fd01::5/64")),),
        routes=(
            NetworkRoute(destination="0.0.0.0/0", gateway="10.1.0.1"),
            NetworkRoute(destination="::/0", gateway="fd01::1"),
            NetworkRoute(destination="10.9.0.0/16", gateway="10.1.0.9"),
        ),
        dns_servers=("10.1.0.53",),
        dns_searches=("svc",),
        dns_options=("ndots:5",),
        result=RESULT,
    )


def test_what_the_kernel_shows_wins_over_what_plugins_report() -> None:
    """MAC, MTU and routes are the namespace's; links that are up but in no result are there, too."""
    found = attachment(
        RESULT,
        links=(
            Link(name="eth0", mac="dd:dd:dd:dd:dd:dd", mtu=1400, is_up=True),
            Link(name="net1", mac="ee:ee:ee:ee:ee:ee", mtu=9000, is_up=True),
            Link(name="tunl0", mac="00:00:00:00:00:00", mtu=1480, is_up=False),
        ),
        routes=(
            NetworkRoute(destination="0.0.0.0/0", gateway="169.254.1.1", interface="eth0"),
            NetworkRoute(destination="169.254.1.1/32", interface="eth0"),
            NetworkRoute(destination="10.1.0.0/24", interface="eth0"),
        ),
    )
    assert [(entry.name, entry.mac, entry.mtu) for entry in found.interfaces] == [
        ("eth0", "dd:dd:dd:dd:dd:dd", 1400),
        ("net1", "ee:ee:ee:ee:ee:ee", 9000),
    ]
    assert [route.destination for route in found.routes] == ["0.0.0.0/0", "169.254.1.1/32"]


def test_all_interfaces_of_the_pod_are_there_and_the_primary_one_comes_first() -> None:
    """Only the addresses of the pod's own interface are the pod's addresses for Kubernetes."""
    result = {
        "interfaces": [{"name": "net1", "sandbox": NETNS}, {"name": "eth0", "sandbox": NETNS}],
        "ips": [{"address": "10.2.0.2/24", "interface": 0}, {"address": "10.1.0.2/24", "interface": 1}],
    }
    found = attachment(result)
    assert found.ips == ("10.1.0.2",)
    assert [(entry.name, entry.addresses) for entry in found.interfaces] == [
        ("eth0", ("10.1.0.2/24",)),
        ("net1", ("10.2.0.2/24",)),
    ]


@pytest.mark.parametrize(
    "result",
    [
        {"ip4": {"ip": "10.1.0.5/24", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0"}]}},
        {"ips": [{"version": "4", "address": "10.1.0.5/24", "gateway": "10.1.0.1"}], "routes": [{"dst": "0.0.0.0/0"}]},
        {"ips": [{"address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": -1}], "routes": [{"dst": "0.0.0.0/0"}]},
        {
            "interfaces": [],
            "ips": [{"address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 0}],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    ],
)
def test_results_of_old_versions_and_sloppy_plugins(result: dict[str, Any]) -> None:
    """An address without an interface belongs to the pod's own."""
    found = attachment(result)
    assert found.ips == ("10.1.0.5",)
    assert found.interfaces == (Interface(name="eth0", addresses=("10.1.0.5/24",)),)
    assert found.routes == (NetworkRoute(destination="0.0.0.0/0", gateway="10.1.0.1"),)


@pytest.mark.parametrize(
    "result",
    [
        {"ips": [{"address": "10.1.0.500/24"}]},
        {"ips": [{}]},
        {"ips": ["10.1.0.5/24"]},
        {"ips": 7},
        {"interfaces": [{"name": 7}], "ips": []},
        {"interfaces": ["eth0"]},
        {"interfaces": [{"name": "eth0", "mtu": "big"}]},
        {"interfaces": [{"name": "eth0"}], "ips": [{"address": "10.1.0.5/24", "interface": 3}]},
        {"interfaces": [{"name": "eth0"}], "ips": [{"address": "10.1.0.5/24", "interface": "0"}]},
        {"ips": [{"address": "10.1.0.5/24"}], "routes": [{"dst": "everywhere"}]},
        {"ips": [{"address": "10.1.0.5/24"}], "dns": {"nameservers": "1.2.3.4"}},
        {"ips": [{"address": "10.1.0.5/24"}], "dns": ["x"]},
        {"ip4": "10.1.0.5"},
    ],
)
def test_results_without_sense_are_refused(result: dict[str, Any]) -> None:
    """A plugin's answer is checked before anything believes it."""
    with pytest.raises(NetworkFailed):
        attachment(result)


def test_result_without_an_address_for_the_pod_is_refused() -> None:
    """An address on the host's side does not count."""
    host_side = {"interfaces": [{"name": "cni0"}], "ips": [{"address": "10.1.0.1/24", "interface": 0}]}
    for result in ({}, host_side):
        with pytest.raises(NetworkFailed, match="no address"):
            attachment(result)


def test_answers_of_plugins() -> None:
    """Success needs an object, whose version is added where an old plugin left it out."""
    assert parse_success(b'{"ips": []}', cni_version="0.2.0") == {"ips": [], "cniVersion": "0.2.0"}
    for nonsense in (b"", b"[]", b"{", b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}'):
        with pytest.raises(ValueError):
            parse_success(nonsense, cni_version="1.0.0")


@pytest.mark.parametrize(
    ("stdout", "stderr", "code", "text"),
    [
        (b'{"code": 7, "msg": "bad", "details": "very"}', b"noise", 7, "bad; very"),
        (b'{"code": "7", "msg": "bad"}', b"", 0, "bad"),
        (b"{}", b"words\x1b[31m\nmore", 0, "words [31m more"),
        (b"plain", b"", 0, "plain"),
        (b"[1]", b"", 0, "[1]"),
        (b"", b"", 0, "no message, exit status 3"),
        (b"", b"x" * 5000, 0, "x" * 1000 + "..."),
        (b"\xff", b"", 0, "\ufffd"),
    ],
)
def test_errors_of_plugins_are_quoted_safely(stdout: bytes, stderr: bytes, code: int, text: str) -> None:
    """The plugin's own words, on one line, bounded, without control characters."""
    error = parse_error(3, stdout, stderr)
    assert (error.code, error.text) == (code, text)


def test_versions_of_plugins() -> None:
    """Sorted by number; what is no version is ignored."""
    assert parse_versions(b'{"supportedVersions": ["0.10.0", "0.9.0", "x", 7, "0.9.0"]}') == ("0.9.0", "0.10.0")
    assert parse_versions(b'{"supportedVersions": []}') == ("0.1.0",)
    for nonsense in (b"", b"{}", b"[]", b'{"supportedVersions": 7}'):
        with pytest.raises(ValueError):
            parse_versions(nonsense)
