"""What a client learns first: version, conditions, configuration."""

from __future__ import annotations

import re

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import CriClient


def test_version_is_complete_and_is_what_the_kubelet_compares_with(cri: CriClient) -> None:
    for asked in ("", "0.1.0"):
        version = cri.version(asked)
        assert version.version == "0.1.0"
        assert version.runtime_name
        assert re.match(r"v?\d+\.\d+\.\d+", version.runtime_version)
        assert version.runtime_api_version == "v1"


def test_runtime_and_network_are_ready(cri: CriClient) -> None:
    conditions = {condition.type: condition for condition in cri.status().status.conditions}
    assert conditions["RuntimeReady"].status, conditions["RuntimeReady"].message
    assert conditions["NetworkReady"].status, conditions["NetworkReady"].message


def test_every_handler_is_listed_with_the_default_one(cri: CriClient) -> None:
    names = [handler.name for handler in cri.status().runtime_handlers]
    assert "" in names
    assert len(names) == len(set(names))


def test_verbose_status_has_information_and_terse_has_none(cri: CriClient) -> None:
    assert cri.status(verbose=True).info
    assert not cri.status().info


def test_the_cgroup_driver_is_told(cri: CriClient) -> None:
    assert cri.rpc("RuntimeConfig").linux.cgroup_driver in (pb.SYSTEMD, pb.CGROUPFS)


def test_the_pod_range_of_the_node_is_accepted(cri: CriClient) -> None:
    network = pb.NetworkConfig(pod_cidr="10.1.2.0/24")
    cri.rpc(
        "UpdateRuntimeConfig", pb.UpdateRuntimeConfigRequest(runtime_config=pb.RuntimeConfig(network_config=network))
    )
