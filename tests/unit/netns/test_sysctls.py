"""Which network sysctls of a pod reach the kernel, as values."""

from __future__ import annotations

import pytest

from dispatcher.errors import InvalidRequest
from dispatcher.netns import make_net_sysctls


def test_only_network_settings_are_taken() -> None:
    """The others belong to namespaces that somebody else makes."""
    wanted = {"kernel.shmmax": "1", "net.core.somaxconn": "1024", "fs.mqueue.msg_max": "10"}
    (setting,) = make_net_sysctls(wanted)
    assert (setting.name, setting.parts, setting.value) == (
        "net.core.somaxconn",
        ("net", "core", "somaxconn"),
        "1024",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("net.ipv4.ip_local_port_range", "1024 65000"),
        ("net.ipv4.tcp_rmem", "4096\t87380 6291456"),
        ("net.ipv4.ping_group_range", "0 2147483647"),
        ("net.ipv4.ip_local_reserved_ports", "80,8000-8080"),
        ("net.ipv4.ip_local_reserved_ports", ""),
        ("net.ipv4.tcp_congestion_control", "cubic"),
        ("net.ipv4.conf.eth0.rp_filter", "-1"),
        ("net.ipv6.conf.all.disable_ipv6", "1"),
        ("net.ipv4.neigh.default.gc_thresh1", "128"),
        ("net.netfilter.nf_conntrack_max", "262144"),
    ],
)
def test_usual_settings_pass(name: str, value: str) -> None:
    """What clusters set."""
    assert [(setting.name, setting.value) for setting in make_net_sysctls({name: value})] == [(name, value)]


@pytest.mark.parametrize(
    "name",
    [
        "net",
        "net.",
        "net.ipv4",
        "net..core.somaxconn",
        "net/core/somaxconn",
        "net.core.../../kernel/core_pattern",
        "net.ipv4.conf/../../x",
        "net.ipv4.conf...rp_filter",
        "net.ipv4.conf.a b.rp_filter",
        "net.core.SOMAXCONN",
        "net.core.somaxconn\n",
        "net.bridge.bridge-nf-call-iptables",
        "net.core.\0",
        "net.ipv4.conf." + "x" * 16 + ".rp_filter",
    ],
)
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    """A name is a path below /proc/sys/net and cannot leave it."""
    with pytest.raises(InvalidRequest, match="is not the name of a network sysctl"):
        make_net_sysctls({name: "1"})


@pytest.mark.parametrize("value", ["", " ", "1;2", "on", "0x10", "1 2 3 4", "1\n2", "9" * 20, "٣"])
def test_values_have_the_settings_type(value: str) -> None:
    """One to three integers, but for the few settings that are something else."""
    with pytest.raises(InvalidRequest, match="is not a value"):
        make_net_sysctls({"net.core.somaxconn": value})
    with pytest.raises(InvalidRequest, match="is not a value"):
        make_net_sysctls({"net.ipv4.ip_local_reserved_ports": value + ";"})
