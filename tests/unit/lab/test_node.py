"""A node takes away the firewall rules of its own network, and leaves everybody else's."""

from __future__ import annotations

import subprocess

from tests.lab.child import find_program
from tests.lab.node import cni_chains, remove_network_rules
from tests.lab.own_host import own_host, run


def pod_rules(network: str, chain: str) -> None:
    """The rules that the bridge plugin makes for one pod."""
    run(f"iptables -t nat -N {chain}")
    comment = ["-m", "comment", "--comment", f'name: "{network}" id: "1"']
    for rule, jump in (
        (["-A", chain, "-d", "10.1.2.0/24"], "ACCEPT"),
        (["-A", "POSTROUTING", "-s", "10.1.2.3"], chain),
    ):
        command = [find_program("iptables"), "-t", "nat", *rule, *comment, "-j", jump]
        subprocess.run(command, check=True, capture_output=True)


@own_host
async def test_rules_of_one_network_are_taken_away_and_of_no_other() -> None:
    pod_rules("lab-mine", "CNI-aaaa")
    pod_rules("lab-theirs", "CNI-bbbb")
    run("iptables -t nat -N CNI-HOSTPORT-DNAT")
    remove_network_rules("lab-mine", keep=cni_chains())
    assert {chain for _program, _table, chain in cni_chains()} == {"CNI-bbbb", "CNI-HOSTPORT-DNAT"}
    remove_network_rules("lab-theirs", keep=set())
    assert cni_chains() == set()


@own_host
async def test_a_host_port_in_use_keeps_the_shared_chains() -> None:
    run("iptables -t nat -N CNI-HOSTPORT-DNAT")
    run("iptables -t nat -A CNI-HOSTPORT-DNAT -p tcp --dport 80 -j RETURN")
    remove_network_rules("lab-mine", keep=set())
    assert [chain for _program, _table, chain in cni_chains()] == ["CNI-HOSTPORT-DNAT"]
