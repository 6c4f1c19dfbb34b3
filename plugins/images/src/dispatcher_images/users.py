"""Who a container's first process is: the image's User string, passwd and group, under range checks.

Pure and bounded. Everything here was written by an attacker: files are cut by their reader before they arrive, lines
that make no sense are skipped as libc does, numbers out of range are refused and never wrapped (CVE-2024-40635).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dispatcher.errors import InvalidRequest
from dispatcher.model import ContainerUser, GroupsPolicy

MAX_ID = 2**31 - 1  # what the kernel, libc and Kubernetes agree on; larger values wrapped to 0 elsewhere
MAX_GROUPS = 65536  # NGROUPS_MAX
_MAX_NAME = 256
_MAX_LINE = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountFiles:
    """An image's /etc/passwd and /etc/group, b"" where it has none."""

    passwd: bytes = b""
    group: bytes = b""


def numeric_user(user: str) -> int | None:
    """Return the uid of an image's User string, or None where it names a user or nothing.

    Raises:
        InvalidRequest: the number is out of range.
    """
    name, _, _ = user.partition(":")
    return _parse_id(name, "user") if name else None


def user_name(user: str) -> str:
    """Return the name in an image's User string, or "" where it is numeric or empty."""
    name, _, _ = user.partition(":")
    return "" if _is_number(name) else name


def resolve_user(
    files: AccountFiles,
    *,
    user: str,
    uid: int | None,
    gid: int | None,
    supplemental_groups: tuple[int, ...],
    policy: GroupsPolicy,
) -> ContainerUser:
    """Work out uid, primary gid and groups; see `ImageProvider.resolve_user`.

    A numeric user without a passwd line has gid 0, as everywhere. The primary gid comes first in the groups; the rest
    is sorted, so that equal inputs give equal results.

    Raises:
        InvalidRequest: a name that the image does not know, an id out of range, a gid without any user.
    """
    named_user, _, named_group = user.partition(":")
    if uid is not None:
        named_user, named_group = str(uid), ""
    if gid is not None and not named_user:
        raise InvalidRequest("A group is asked for without a user: set run_as_user or run_as_username too.")
    account = _account(files.passwd, named_user or "0", must_exist=bool(named_user))
    primary = account.gid
    if gid is not None:
        primary = _check(gid, "group")
    elif named_group:
        primary = _group_id(files.group, named_group)
    groups = {_check(group, "group") for group in supplemental_groups}
    # A named group says exactly which one: runc and Docker add no memberships then, and neither do we.
    if policy is GroupsPolicy.MERGE and account.name and not named_group:
        groups.update(_memberships(files.group, account.name))
    groups.discard(primary)
    if len(groups) >= MAX_GROUPS:
        raise InvalidRequest(f"The user is in more than {MAX_GROUPS} groups.")
    return ContainerUser(uid=account.uid, gid=primary, supplemental_groups=(primary, *sorted(groups)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    uid: int
    gid: int
    name: str


def _account(passwd: bytes, wanted: str, *, must_exist: bool) -> _Account:
    number = _parse_id(wanted, "user")
    for fields in _lines(passwd, 4):
        found_uid, found_gid = _file_id(fields[2]), _file_id(fields[3])
        if found_uid is None or found_gid is None:
            continue
        if (found_uid == number) if number is not None else (fields[0] == wanted):
            return _Account(uid=found_uid, gid=found_gid, name=fields[0])
    if number is not None:
        return _Account(uid=number, gid=0, name="")
    if must_exist:
        raise InvalidRequest(f"The image's /etc/passwd has no user {wanted[:_MAX_NAME]!r}.")
    return _Account(uid=0, gid=0, name="")


def _group_id(group: bytes, wanted: str) -> int:
    number = _parse_id(wanted, "group")
    if number is not None:
        return number
    for fields in _lines(group, 3):
        found = _file_id(fields[2])
        if found is not None and fields[0] == wanted:
            return found
    raise InvalidRequest(f"The image's /etc/group has no group {wanted[:_MAX_NAME]!r}.")


def _memberships(group: bytes, name: str) -> Iterator[int]:
    for fields in _lines(group, 4):
        found = _file_id(fields[2])
        if found is not None and name in fields[3].split(","):
            yield found


def _lines(content: bytes, fields: int) -> Iterator[list[str]]:
    """Yield the fields of each line that has enough of them; the last field holds the rest."""
    for line in content.split(b"\n"):
        if not line or line.startswith(b"#") or len(line) > _MAX_LINE:
            continue
        parts = line.strip().decode("utf-8", "replace").split(":")
        if len(parts) >= fields and parts[0] and len(parts[0]) <= _MAX_NAME:
            yield parts


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _file_id(text: str) -> int | None:
    """An id in an account file: a line with an absurd one does not exist, it never means root."""
    if not _is_number(text) or len(text) > 10:
        return None
    number = int(text)
    return number if number <= MAX_ID else None


def _parse_id(text: str, kind: str) -> int | None:
    """Return a numeric id, None for a name. Signs, blanks and digits of other scripts are names that cannot exist."""
    if not _is_number(text):
        return None
    if len(text.lstrip("0")) > 10:
        raise InvalidRequest(f"The {kind} id {text[:20]}... is out of range (0 to {MAX_ID}).")
    return _check(int(text), kind)


def _check(number: int, kind: str) -> int:
    if not 0 <= number <= MAX_ID:
        raise InvalidRequest(f"The {kind} id {number} is out of range (0 to {MAX_ID}).")
    return number
