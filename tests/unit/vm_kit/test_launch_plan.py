"""The record that the launcher reads."""

from __future__ import annotations

import struct

import pytest

from dispatcher_vm_kit.launcher import KEEP_ID, LaunchPlan, pack_plan

HEADER = struct.Struct("=2I4i2Ii5IQ")


def test_plan_has_the_launchers_size() -> None:
    """The C side asserts the same number."""
    assert len(pack_plan(LaunchPlan())) == 464


def test_empty_plan_changes_nothing() -> None:
    """No descriptor, no namespace, nobody else's user."""
    magic, flags, *rest = HEADER.unpack_from(pack_plan(LaunchPlan()))
    assert magic.to_bytes(4, "little") == b"DVL1"
    assert flags == 4  # no huge pages
    assert rest[:4] == [-1, -1, -1, -1]
    assert rest[4:6] == [KEEP_ID, KEEP_ID]


def test_fields_are_where_the_launcher_reads_them() -> None:
    """Numbers arrive in their places, the lock among what is kept open."""
    plan = LaunchPlan(
        lock_fd=5,
        cgroup_fds=(6, 7),
        netns_fd=8,
        root_fd=9,
        share_fd=10,
        uid=1900000001,
        gid=1900000002,
        groups=(44,),
        capabilities=1 << 40 | 1,
        oom_score_adj=-998,
        limits=((7, 4096, 4096), (4, 0, -1)),
        kept_fds=(11, 12),
        kvm=True,
    )
    packed = pack_plan(plan)
    fields = HEADER.unpack_from(packed)
    assert fields[1:] == (1 | 4 | 8, 5, 8, 9, 10, 1900000001, 1900000002, -998, 2, 2, 1, 3, 0, 1 << 40 | 1)
    assert struct.unpack_from("=2i", packed, 64) == (6, 7)
    assert struct.unpack_from("=I", packed, 128) == (44,)
    assert struct.unpack_from("=3i", packed, 144) == (11, 12, 5)
    assert struct.unpack_from("=2I2Q2I2Q", packed, 272) == (7, 0, 4096, 4096, 4, 0, 0, (1 << 64) - 1)
    assert set(plan.fds) == {5, 6, 7, 8, 9, 10, 11, 12}


@pytest.mark.parametrize(
    "plan",
    [LaunchPlan(cgroup_fds=tuple(range(17))), LaunchPlan(groups=(1,) * 5), LaunchPlan(kept_fds=tuple(range(33)))],
)
def test_too_much_is_refused(plan: LaunchPlan) -> None:
    """The record has room for so many, and no overflow."""
    with pytest.raises(ValueError, match="more"):
        pack_plan(plan)
