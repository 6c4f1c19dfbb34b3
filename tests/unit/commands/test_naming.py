"""Finding what a user means, and printing what pods named themselves."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from dispatcher.commands.connection import match_container, match_pod, parse_info, positive_seconds
from dispatcher.commands.output import Console, Failure, age, printable
from dispatcher.commands.pod_folders import folder_of, remove_folders
from dispatcher.cri import api_pb2 as pb
from dispatcher.cri.client import Endpoint


def pod(identifier: str, name: str, *, namespace: str = "default", uid: str = "u", attempt: int = 0) -> pb.PodSandbox:
    metadata = pb.PodSandboxMetadata(name=name, namespace=namespace, uid=uid, attempt=attempt)
    return pb.PodSandbox(id=identifier, metadata=metadata, created_at=attempt)


def test_a_pod_is_found_by_id_prefix_name_and_namespace() -> None:
    pods = [pod("abc1", "web"), pod("abd2", "db", namespace="prod", uid="v")]
    assert match_pod("abc", pods) is pods[0]
    assert match_pod("web", pods) is pods[0]
    assert match_pod("prod/db", pods) is pods[1]
    assert match_pod("nope", pods) is None


def test_the_newest_attempt_is_meant() -> None:
    pods = [pod("a1", "web", attempt=1), pod("a0", "web", attempt=0)]
    assert match_pod("web", pods) is pods[0]


def test_ambiguity_is_an_error_that_lists_candidates() -> None:
    with pytest.raises(Failure, match=r"names 2 pods:\nabc1  default/web\nabc2  default/db"):
        match_pod("abc", [pod("abc1", "web"), pod("abc2", "db")])
    with pytest.raises(Failure, match="names 2 pods"):
        match_pod("web", [pod("a", "web", namespace="x", uid="1"), pod("b", "web", namespace="y", uid="2")])
    with pytest.raises(Failure, match="names 2 containers"):
        match_container("c", [pb.Container(id="c1"), pb.Container(id="c2")])


def test_a_name_wins_over_the_beginning_of_an_id() -> None:
    pods = [pod("beef1", "x", uid="1"), pod("0", "beef", uid="2")]
    assert match_pod("beef", pods) is pods[1]


def test_an_empty_word_names_nothing() -> None:
    assert match_pod("", [pod("a", "web")]) is None
    assert match_container("", [pb.Container(id="c1")]) is None


def test_what_pods_call_themselves_does_not_reach_the_terminal() -> None:
    out = io.StringIO()
    console = Console(out, io.StringIO())
    console.table(("NAME",), [("evil\x1b[2J\nroot",)])
    console.fields([("name", "a\rb"), ("empty", "")])
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().splitlines() == ["NAME", "evil\\x1b[2J\\nroot", "name: a\\rb"]
    assert printable("über") == "über"


def test_failures_say_what_to_do() -> None:
    err = io.StringIO()
    Console(io.StringIO(), err).complain(Failure("it is broken\nreally", hint="mend it"))
    assert err.getvalue() == "dispatcher: it is broken\n  really\n  -> mend it\n"


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (200_000, "2d")])
def test_age(seconds: int, shown: str) -> None:
    assert age(1, seconds * 1_000_000_000 + 1) == shown
    assert age(0) == "-"


def test_info_that_is_no_json_stays_text() -> None:
    assert parse_info({"a": '{"x": 1}', "b": "plain"}) == {"a": {"x": 1}, "b": "plain"}


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf", "1e9"])
def test_seconds_are_above_zero(text: str) -> None:
    with pytest.raises(Exception, match="seconds above zero"):
        positive_seconds(text)


@pytest.mark.parametrize("uid", ["..", "a/b", "", "-x", "a" * 65, "x\0"])
def test_only_plain_uids_become_folders(uid: str, tmp_path: Path) -> None:
    assert folder_of(str(tmp_path), uid) is None
    (tmp_path / "kept").mkdir()
    remove_folders(str(tmp_path), uid)
    assert (tmp_path / "kept").is_dir()


def test_folders_are_removed_but_links_are_not_followed(tmp_path: Path) -> None:
    pods, outside = tmp_path / "pods", tmp_path / "outside"
    (pods / "uid-1" / "logs").mkdir(parents=True)
    outside.mkdir()
    (pods / "uid-2").symlink_to(outside)
    remove_folders(str(pods), "uid-1")
    remove_folders(str(pods), "uid-2")
    remove_folders(str(pods), "uid-3")
    assert not (pods / "uid-1").exists()
    assert outside.is_dir()


def test_endpoints() -> None:
    assert Endpoint("unix:///run/x.sock").path == "/run/x.sock"
    assert Endpoint("/run/x.sock").target == "unix:/run/x.sock"
    for bad in ("tcp://127.0.0.1:1", "x.sock", "unix://x.sock", ""):
        with pytest.raises(ValueError, match=r"unix:///path"):
            Endpoint(bad)
    assert "does not exist" in Endpoint("/nowhere/x.sock").why_unreachable()
