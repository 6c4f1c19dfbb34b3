"""Reading the limits of a pod's cgroup from recorded trees of either version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dispatcher.model import PodMetadata, PodSpec
from dispatcher_vm_sizing.cgroup import CgroupLimits, read_pod_limits
from dispatcher_vm_sizing.config import MIB, SizingConfig
from dispatcher_vm_sizing.plugin import plugin
from dispatcher_vm_sizing.provider import VmSizer

POD = "kubepods/burstable/pod7"


def plant(root: Path, files: dict[str, str]) -> Path:
    """Make a tree."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v1(memory: str, quota: str, period: str = "100000\n", cpu: str = "cpu") -> dict[str, str]:
    """A pod under version 1."""
    return {
        f"memory/{POD}/memory.limit_in_bytes": memory,
        f"{cpu}/{POD}/cpu.cfs_quota_us": quota,
        f"{cpu}/{POD}/cpu.cfs_period_us": period,
    }


def v2(memory: str, cpu: str) -> dict[str, str]:
    """A pod under version 2."""
    return {"cgroup.controllers": "cpu memory\n", f"{POD}/memory.max": memory, f"{POD}/cpu.max": cpu}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (v1("134217728\n", "50000\n"), CgroupLimits(memory_bytes=128 * MIB, cpu_quota_us=50_000)),
        (
            v1("134217728\n", "5000\n", "10000\n", "cpu,cpuacct"),
            CgroupLimits(memory_bytes=128 * MIB, cpu_quota_us=5000, cpu_period_us=10_000),
        ),
        (v1("9223372036854771712\n", "-1\n"), CgroupLimits()),
        ({f"memory/{POD}/memory.limit_in_bytes": "1048576\n"}, CgroupLimits(memory_bytes=MIB)),
        ({f"cpu/{POD}/cpu.cfs_quota_us": "1000\n"}, CgroupLimits(cpu_quota_us=1000)),
        (v2("134217728\n", "50000 100000\n"), CgroupLimits(memory_bytes=128 * MIB, cpu_quota_us=50_000)),
        (v2("max\n", "max 100000\n"), CgroupLimits()),
        (v2("0\n", "max 20000\n"), CgroupLimits(cpu_period_us=20_000)),
        (v2("nonsense\n", ""), CgroupLimits()),
        (v2("9" * 500, "1" * 500), CgroupLimits()),
        ({"cgroup.controllers": "", f"{POD}/cgroup.procs": ""}, CgroupLimits()),
        ({"cgroup.controllers": ""}, None),
        ({"memory/tasks": ""}, None),
        ({}, None),
    ],
)
def test_limits(tmp_path: Path, files: dict[str, str], found: CgroupLimits | None) -> None:
    """Every spelling of a number and of "unlimited"; a cgroup that is not there is told from one without limits."""
    assert read_pod_limits(plant(tmp_path, files), "/" + POD) == found


def test_hybrid_host_is_version_1(tmp_path: Path) -> None:
    """An empty version 2 mount beside version 1 hierarchies does not count."""
    plant(tmp_path, {**v1("1048576\n", "-1\n"), "unified/cgroup.controllers": "", f"unified/{POD}/memory.max": "max"})
    assert read_pod_limits(tmp_path, POD) == CgroupLimits(memory_bytes=MIB)


def test_sizer_reads_the_pods_cgroup_where_the_request_says_nothing(tmp_path: Path) -> None:
    """The provider, over a tree of its own."""
    plant(tmp_path, v2("314572800\n", "150000 100000\n"))
    sizer = VmSizer(SizingConfig(cgroup_root=tmp_path, guest_overhead_mib=80))
    pod = PodSpec(metadata=PodMetadata(name="a", namespace="b", uid="c"), cgroup_parent="/" + POD)
    size = sizer.size(pod)
    assert (size.limit_bytes, size.guest_memory_bytes, size.vcpus) == (300 * MIB, 384 * MIB, 2)
    assert "The memory limit of 300 MiB was read from the pod's cgroup." in size.notes


@pytest.mark.parametrize(
    "section",
    [
        {"memory_classes_mib": []},
        {"memory_classes_mib": [256, 128]},
        {"vcpu_classes": [0, 1]},
        {"charge": "nobody"},
        {"default_memory_mib": 1},
        {"overhead": 7},
    ],
)
def test_wrong_section_is_refused(section: dict[str, Any]) -> None:
    """`dispatcher config check` runs this."""
    with pytest.raises(ValueError):
        SizingConfig.from_section(section)


def test_plugin_enrols_its_sizer() -> None:
    """The entry point offers one sizer and the check of its section."""
    offers: dict[str, Any] = {}

    class Recorder:
        def sizer(self, name: str, factory: Any) -> None:
            offers[name] = factory

        def check_section(self, check: Any) -> None:
            offers["check"] = check

    plugin.register(Recorder())  # type: ignore[arg-type]
    assert set(offers) == {"vm_sizing", "check"}
    assert offers["vm_sizing"]({"charge": "shrink"}, None).name == "vm_sizing"
    with pytest.raises(ValueError):
        offers["check"]({"typo": 1})
