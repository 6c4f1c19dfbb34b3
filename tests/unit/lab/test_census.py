"""The census sees each kind of thing that a test can leave behind, and nothing where nothing was left."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.lab import census
from tests.lab.child import SYSTEM_PATH
from tests.lab.engine import Engine
from tests.lab.images import BUSYBOX, TestImages

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NAME = f"census{os.getpid() % 100000}"


def run(*command: str) -> None:
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":" + SYSTEM_PATH}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
    assert done.returncode == 0, done.stderr


@contextmanager
def namespace() -> Iterator[str]:
    run("ip", "netns", "add", NAME)
    try:
        yield f"named /run/netns/{NAME}"
    finally:
        run("ip", "netns", "delete", NAME)


@contextmanager
def link() -> Iterator[str]:
    run("ip", "link", "add", NAME, "type", "bridge")
    try:
        yield f"{NAME} bridge"
    finally:
        run("ip", "link", "delete", NAME)


@contextmanager
def address() -> Iterator[str]:
    run("ip", "address", "add", "127.88.0.1/32", "dev", "lo")
    try:
        yield "lo 127.88.0.1/32"
    finally:
        run("ip", "address", "delete", "127.88.0.1/32", "dev", "lo")


@contextmanager
def route() -> Iterator[str]:
    run("ip", "route", "add", "198.51.100.77/32", "dev", "lo")
    try:
        yield "-4 dst 198.51.100.77 dev lo"
    finally:
        run("ip", "route", "delete", "198.51.100.77/32", "dev", "lo")


@contextmanager
def iptables_chain() -> Iterator[str]:
    run("iptables", "-N", NAME)
    try:
        yield f"iptables-save *filter :{NAME}"
    finally:
        run("iptables", "-X", NAME)


@contextmanager
def nft_table() -> Iterator[str]:
    run("nft", "add", "table", "inet", NAME)
    try:
        yield f'table {{"family": "inet", "name": "{NAME}"}}'
    finally:
        run("nft", "delete", "table", "inet", NAME)


@contextmanager
def mount(folder: Path) -> Iterator[str]:
    run("mount", "-t", "tmpfs", NAME, str(folder))
    try:
        yield f"{folder} / tmpfs {NAME}"
    finally:
        run("umount", str(folder))


@contextmanager
def cgroup() -> Iterator[str]:
    top = Path("/sys/fs/cgroup")
    hierarchy = top if (top / "cgroup.controllers").exists() else top / "memory"
    folder = hierarchy / NAME
    try:
        folder.mkdir()
    except OSError as exc:
        pytest.skip(f"cannot make a cgroup: {exc}")
    try:
        yield str(folder)
    finally:
        folder.rmdir()


@contextmanager
def process() -> Iterator[str]:
    with subprocess.Popen([sys.executable, "-c", f"import sys; sys.stdin.read() # {NAME}"], stdin=subprocess.PIPE):
        yield NAME


@contextmanager
def tcp_socket() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp 0100007F:{server.getsockname()[1]:04X}"


@contextmanager
def unix_socket(folder: Path) -> Iterator[str]:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield f"unix {path}"


@contextmanager
def file(folder: Path) -> Iterator[str]:
    path = folder / "left"
    path.write_text("")
    try:
        yield f"- {path}"
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        pytest.param("namespaces", namespace, marks=needs_root),
        pytest.param("links", link, marks=needs_root),
        pytest.param("addresses", address, marks=needs_root),
        pytest.param("routes", route, marks=needs_root),
        pytest.param("iptables", iptables_chain, marks=needs_root),
        pytest.param("nft", nft_table, marks=needs_root),
        pytest.param("cgroups", cgroup, marks=needs_root),
        ("processes", process),
        ("sockets", tcp_socket),
    ],
)
def test_a_thing_left_behind_is_shown_and_its_removal_too(
    kind: str, make: Callable[[], AbstractContextManager[str]]
) -> None:
    check_shown(kind, make(), census.Scope())


@needs_root
def test_a_mount_left_behind_is_shown(tmp_path: Path) -> None:
    check_shown("mounts", mount(tmp_path), census.Scope())


def test_a_named_socket_left_behind_is_shown(tmp_path: Path) -> None:
    check_shown("sockets", unix_socket(tmp_path), census.Scope())


def test_a_file_left_behind_is_shown(tmp_path: Path) -> None:
    check_shown("files", file(tmp_path), census.Scope(files=[tmp_path]))


@pytest.mark.lab
def test_a_container_left_behind_is_shown(engine: Engine, test_images: TestImages) -> None:
    name = test_images.direct(BUSYBOX)
    engine.request("POST", f"/images/create?fromImage={name}")

    @contextmanager
    def container() -> Iterator[str]:
        made = engine.request("POST", "/containers/create", {"Image": name}).json()["Id"]
        try:
            yield f"{engine.socket} {made}"
        finally:
            engine.request("DELETE", f"/containers/{made}")

    check_shown("containers", container(), census.Scope(engines=[engine.socket]))


def test_every_kind_has_a_negative_control() -> None:
    """A kind added to the census without a control here would be a promise that nothing checks."""
    parametrised = test_a_thing_left_behind_is_shown_and_its_removal_too.pytestmark[0].args[1]  # type: ignore[attr-defined]
    controlled = {part.values[0] if hasattr(part, "values") else part[0] for part in parametrised}
    assert controlled | {"mounts", "files", "containers"} == set(census.KINDS)


def test_nothing_left_behind_is_clean(tmp_path: Path) -> None:
    """Only kinds that nobody else on the machine can change meanwhile."""
    scope = census.Scope(files=[tmp_path])
    before = census.take(scope)
    assert census.compare(before, before) == []
    census.assert_clean(before, scope, kinds=["files"], settle_s=0)
    assert census.Census.from_json(before.to_json()) == before


def test_assert_clean_names_what_is_left(tmp_path: Path) -> None:
    scope = census.Scope(files=[tmp_path])
    before = census.take(scope)
    (tmp_path / "left").write_text("")
    with pytest.raises(AssertionError, match=r"files:\n  \+ - .*left"):
        census.assert_clean(before, scope, kinds=["files"], settle_s=0)


def test_ignored_entries_do_not_count(tmp_path: Path) -> None:
    before = census.Census({"files": frozenset()})
    after = census.Census({"files": frozenset({"- /a/theirs"})})
    assert census.compare(before, after)
    assert not census.compare(before, after, ignore=["theirs$"])


def test_the_command_line_tells_a_difference_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert census.main(["take", str(first), "--files", str(folder)]) == 0
    (folder / "left").write_text("")
    assert census.main(["take", str(second), "--files", str(folder)]) == 0
    capsys.readouterr()
    assert census.main(["compare", str(first), str(second), "--ignore", "^(?!- )"]) == 1
    assert f"+ - {folder}/left" in capsys.readouterr().out


def check_shown(kind: str, thing: AbstractContextManager[str], scope: census.Scope) -> None:
    before = census.take(scope)
    with contextlib.ExitStack() as stack:
        entry = stack.enter_context(thing)
        assert any(entry in line for line in added(kind, before, census.take(scope))), f"{entry} is not shown"
        during = census.take(scope)
    gone = [part for part in census.compare(during, census.take(scope)) if part.kind == kind]
    assert any(entry in line for part in gone for line in part.removed), f"removal of {entry} is not shown"


def added(kind: str, before: census.Census, after: census.Census) -> tuple[str, ...]:
    return next((part.added for part in census.compare(before, after) if part.kind == kind), ())
