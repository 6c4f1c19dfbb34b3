"""Who a container runs as, from hostile account files."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import InvalidRequest
from dispatcher.model import GroupsPolicy
from dispatcher_images.users import MAX_ID, AccountFiles, numeric_user, resolve_user, user_name

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/:/bin/false\nalice:x:1000:1000::/home:/bin/sh\n"
GROUP = b"root:x:0:\nwww-data:x:33:\nwheel:x:10:root,alice\nextra:x:50000:alice\nempty:x:60000:\n"
FILES = AccountFiles(passwd=PASSWD, group=GROUP)


def who(
    user: str = "",
    *,
    uid: int | None = None,
    gid: int | None = None,
    groups: tuple[int, ...] = (),
    policy: GroupsPolicy = GroupsPolicy.MERGE,
    files: AccountFiles = FILES,
) -> tuple[int, int, tuple[int, ...]]:
    found = resolve_user(files, user=user, uid=uid, gid=gid, supplemental_groups=groups, policy=policy)
    return found.uid, found.gid, found.supplemental_groups


def test_without_any_user_it_is_root_with_its_memberships() -> None:
    assert who() == (0, 0, (0, 10))
    assert who(files=AccountFiles()) == (0, 0, (0,))


def test_names_and_numbers_find_the_same_account() -> None:
    assert who("alice") == who("1000") == who(uid=1000) == (1000, 1000, (1000, 10, 50000))


def test_a_number_without_account_has_gid_0() -> None:
    assert who("4242") == (4242, 0, (0,))
    assert who("4242:7") == (4242, 7, (7,))


def test_an_image_user_with_a_group_gets_exactly_that_group() -> None:
    assert who("alice:www-data") == (1000, 33, (33,))
    assert who("1003:1004") == (1003, 1004, (1004,))


def test_merge_adds_the_images_memberships_and_strict_does_not() -> None:
    assert who(uid=1000, gid=3000, groups=(4000,)) == (1000, 3000, (3000, 10, 4000, 50000))
    assert who(uid=1000, gid=3000, groups=(4000,), policy=GroupsPolicy.STRICT) == (1000, 3000, (3000, 4000))


def test_the_requested_uid_wins_over_the_images_user_and_its_group() -> None:
    assert who("www-data:extra", uid=1000) == (1000, 1000, (1000, 10, 50000))


def test_a_group_without_a_user_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="without a user"):
        who(gid=5)


@pytest.mark.parametrize("user", ["nobody-here", "alice:no-such-group", ":5x", "-1", "1e3", "٣", " 5"])
def test_unknown_names_are_refused(user: str) -> None:
    with pytest.raises(InvalidRequest):
        who(user)


@pytest.mark.parametrize(
    "user",
    ["2147483648", "4294967295", "4294967296", "4294967296:4294967296", "0:4294967296", "9" * 30, "1000:2147483648"],
)
def test_an_id_out_of_range_is_refused_and_never_wraps_to_root(user: str) -> None:
    with pytest.raises(InvalidRequest, match="out of range"):
        who(user)


def test_an_absurd_id_in_the_files_does_not_exist() -> None:
    evil = b"evil:x:4294967296:0::/:\nneg:x:-1:-1::/:\nbig:x:99999999999999999999:1::/:\nshort:x:5\n"
    for name in ("evil", "neg", "big", "short"):
        with pytest.raises(InvalidRequest):
            who(name, files=AccountFiles(passwd=evil))
    group = b"g:x:4294967296:alice\nh:x:7:alice\n"
    assert who("alice", files=AccountFiles(passwd=PASSWD, group=group)) == (1000, 1000, (1000, 7))


def test_requested_groups_are_range_checked() -> None:
    for groups in ((-1,), (MAX_ID + 1,)):
        with pytest.raises(InvalidRequest):
            who(groups=groups)
    with pytest.raises(InvalidRequest):
        who(uid=-1)


def test_a_huge_group_file_is_answered_in_bounded_time() -> None:
    group = b"".join(b"g%d:x:%d:alice\n" % (number, number) for number in range(65000))
    began = time.monotonic()
    assert len(who("alice", files=AccountFiles(passwd=PASSWD, group=group))[2]) == 65001 - 1
    assert time.monotonic() - began < 5
    too_many = b"".join(b"g%d:x:%d:alice\n" % (number, number + 1) for number in range(70000))
    with pytest.raises(InvalidRequest, match="groups"):
        who("alice", files=AccountFiles(passwd=PASSWD, group=too_many))


def test_what_the_kubelet_is_told_of_an_images_user() -> None:
    assert numeric_user("1002") == 1002
    assert numeric_user("1003:1004") == 1003
    assert numeric_user("www-data:100") is None
    assert user_name("www-data:100") == "www-data"
    assert user_name("1002") == ""
    with pytest.raises(InvalidRequest):
        numeric_user("4294967296")


@given(st.binary(max_size=400), st.binary(max_size=400), st.text(max_size=20))
def test_any_files_resolve_or_are_refused(passwd: bytes, group: bytes, user: str) -> None:
    try:
        uid, gid, groups = who(user, files=AccountFiles(passwd=passwd, group=group))
    except InvalidRequest:
        return
    assert 0 <= uid <= MAX_ID
    assert gid in groups
    assert all(0 <= number <= MAX_ID for number in groups)
