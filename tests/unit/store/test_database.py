"""What happens to the file: versions, damage, a full disk, a second daemon, and a daemon that dies while it writes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dispatcher.errors import OutOfResources
from dispatcher.store import Store, StoreUnusableError
from dispatcher.store.database import Database, Row, rewrite_bodies
from dispatcher.transitions import PodEvent, PodState
from tests.unit.store.records import make_container, make_pod


async def filled(path: Path, pods: int = 30) -> Store:
    store = await Store.open(path)
    for number in range(pods):
        pod = await store.create_pod(make_pod(f"pod{number}", created_at_ns=number + 1))
        await store.create_container(make_container(pod))
    await store.set_setting("node_uuid", "u")
    return store


async def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "state.db"
    store = await Store.open(path)
    await store.create_pod(make_pod())
    assert [oct(file.stat().st_mode & 0o777) for file in sorted(path.parent.iterdir())] == ["0o600", "0o600"]
    assert oct(path.parent.stat().st_mode & 0o777) == "0o700"
    await store.aclose()


async def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db")
    with pytest.raises(StoreUnusableError, match="another dispatcher runs on this state folder"):
        await Store.open(tmp_path / "state.db")
    await store.aclose()
    await (await Store.open(tmp_path / "state.db")).aclose()


async def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreUnusableError, match="another program"):
        await Store.open(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    connection.close()
    assert len(path.read_bytes()) == len(before)


# ------------------------------------------------------------------------------------------------------------ versions
def add_note(connection: sqlite3.Connection) -> None:
    """An example of a migration: every pod gets a note, and there is one more table."""
    rewrite_bodies(connection, "pod", lambda body: body.replace(b'"notes":[]', b'"notes":["migrated"]'))
    connection.execute("CREATE TABLE extra (x)")


def fail(_connection: sqlite3.Connection) -> None:
    raise sqlite3.OperationalError("planted")


async def test_an_older_file_is_migrated_and_kept_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await (await filled(path, 3)).aclose()
    store = await Store.open(path, migrations=[add_note])
    assert [pod.notes for pod in store.list_pods()] == [("migrated",)] * 3
    assert len(store.list_containers()) == 3
    await store.aclose()
    again = await Store.open(path, migrations=[add_note])
    assert [pod.notes for pod in again.list_pods()] == [("migrated",)] * 3, "once, not at each start"
    await again.aclose()
    # The copy is what the version before goes back to.
    before = await Store.open(tmp_path / "state.db.v1")
    assert [pod.notes for pod in before.list_pods()] == [()] * 3
    await before.aclose()


async def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await (await filled(path, 2)).aclose()
    with pytest.raises(StoreUnusableError, match="planted"):
        await Store.open(path, migrations=[add_note, fail])
    # The first migration stands, as schema 2; the second is tried again.
    store = await Store.open(path, migrations=[add_note])
    assert [pod.notes for pod in store.list_pods()] == [("migrated",)] * 2
    await store.aclose()


async def test_a_downgrade_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await (await filled(path, 1)).aclose()
    await (await Store.open(path, migrations=[add_note])).aclose()
    with pytest.raises(StoreUnusableError, match=r"schema 2 .* reads up to 1.*state\.db\.v1"):
        await Store.open(path)
    store = await Store.open(path, migrations=[add_note])
    assert len(store.list_pods()) == 1, "the refusal harmed nothing"
    await store.aclose()


async def test_records_of_a_newer_version_are_refused_and_not_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await filled(path, 1)
    pod = store.list_pods()[0]
    await store.aclose()
    database = Database(path)
    row = next(row for row in database.rows() if row.kind == "pod")
    database.commit([Row("pod", row.id, 99, 7, row.body)])
    database.close()
    with pytest.raises(StoreUnusableError, match="schema 7"):
        await Store.open(path)
    database = Database(path)
    assert {row.id for row in database.rows()} >= {pod.id}
    assert database.aside() == []
    database.close()


# ------------------------------------------------------------------------------------------------------------ set aside
async def test_unreadable_rows_are_set_aside_with_their_containers_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await filled(path, 4)
    bad, with_bad_container, *_ = store.list_pods()
    orphan = store.list_containers(bad.id)[0]
    broken = store.list_containers(with_bad_container.id)[0]
    await store.aclose()
    database = Database(path)
    database.commit(
        [
            Row("pod", bad.id, 2, 1, b'{"id": "torn'),
            Row("container", broken.id, 2, 1, b"\xff\xfe"),
            Row("gadget", "x", 1, 1, b"{}"),
            Row("pod", "not-its-own", 1, 1, next(row.body for row in database.rows() if row.kind == "pod")),
        ]
    )
    database.close()

    store = await Store.open(path)
    aside = {(item.kind, item.id): item.reason for item in store.set_aside}
    assert set(aside) == {
        ("pod", bad.id),
        ("container", orphan.id),
        ("container", broken.id),
        ("gadget", "x"),
        ("pod", "not-its-own"),
    }
    assert "not on record" in aside["container", orphan.id]
    assert len(store.list_pods()) == 3
    assert store.find_pod(bad.id) is None
    assert store.list_containers(with_bad_container.id) == ()
    # The identity is free again, so that the kubelet can make the pod anew.
    await store.create_pod(make_pod(bad.spec.metadata.name))
    await store.aclose()

    again = await Store.open(path)
    assert {(item.kind, item.id) for item in again.set_aside} == set(aside), "reported until somebody looks into it"
    await again.aclose()
    connection = sqlite3.connect(path)
    kept = connection.execute("SELECT body FROM set_aside WHERE id = ?", (bad.id,)).fetchone()
    connection.close()
    assert kept == (b'{"id": "torn',)


# ---------------------------------------------------------------------------------------------------------------- damage
async def test_a_damaged_page_costs_only_what_stood_on_it(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await (await filled(path, 200)).aclose()
    body = bytearray(path.read_bytes())
    pages = len(body) // 4096
    assert pages > 40
    for page in (pages // 2, pages // 2 + 1):
        body[page * 4096 : (page + 1) * 4096] = os.urandom(4096)
    path.write_bytes(body)

    store = await Store.open(path)
    assert "damaged" in store.condition
    assert ".corrupt-" in store.condition
    saved = len(store.list_pods()) + len(store.list_containers())
    assert 100 < saved < 400
    assert store.get_setting("node_uuid") == "u"
    await store.create_pod(make_pod("after"))
    await store.aclose()

    copies = [file for file in tmp_path.iterdir() if ".corrupt-" in file.name and not file.name.endswith("-wal")]
    assert [copy.read_bytes() for copy in copies] == [bytes(body)], "one copy, exactly as it was found"
    again = await Store.open(path)
    assert again.condition == "", "the rebuilt file is sound"
    assert again.find_pod_by_identity(make_pod("after").spec.metadata) is not None
    await again.aclose()


@pytest.mark.parametrize("content", [b"no database at all" * 500, b"SQLite format 3\0" + b"\xee" * 8192])
async def test_a_file_that_cannot_be_read_at_all_stops_the_start_and_is_kept(tmp_path: Path, content: bytes) -> None:
    """To begin with an empty record would forget every running pod: an operator decides that."""
    path = tmp_path / "state.db"
    path.write_bytes(content)
    for _ in range(2):  # a service manager starts us again and again: one copy is enough
        with pytest.raises(StoreUnusableError, match=r"nothing in it can be read\. A copy is"):
            await Store.open(path)
    assert path.read_bytes() == content
    assert len([file for file in tmp_path.iterdir() if ".corrupt-" in file.name]) == 1


# -------------------------------------------------------------------------------------------------------------- full disk
async def test_a_full_disk_is_told_and_survived(tmp_path: Path) -> None:
    store = await filled(tmp_path / "state.db", 5)
    connection = store._database._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    before = store.list_pods()
    pod = before[0]
    with pytest.raises(OutOfResources, match=r"disk .* is full"):
        await store.update_pod(pod.id, facts={"large": "x" * 200_000})
    assert store.list_pods() == before
    connection.execute("PRAGMA max_page_count = 1000000")
    assert (await store.update_pod(pod.id, PodEvent.BOOTED)).state is PodState.READY
    await store.aclose()


_ON_A_SMALL_DISK = """
import asyncio, pathlib, sys
sys.path[:0] = [{root!r}]
from dispatcher.errors import OutOfResources
from dispatcher.store import Store
from tests.unit.store.records import make_pod

async def main():
    path = pathlib.Path({disk!r}) / "state.db"
    store = await Store.open(path)
    made = []
    try:
        for number in range(100000):
            made.append((await store.create_pod(make_pod(str(number), facts={{"f": "x" * 3000}}))).id)
    except OutOfResources as error:
        print("full after", len(made), error)
    assert [pod.id for pod in store.list_pods()] == made
    await store.aclose()

async def again():
    store = await Store.open(pathlib.Path({disk!r}) / "state.db")
    print("found", len(store.list_pods()))
    await store.aclose()

asyncio.run(main())
asyncio.run(again())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_a_really_full_disk_loses_nothing_that_was_promised(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = _ON_A_SMALL_DISK.format(root=os.getcwd(), disk=str(disk))
    command = f'mount -t tmpfs -o size=2m none "{disk}" && exec "{sys.executable}" -c "$SCRIPT"'
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command],
        env={**os.environ, "SCRIPT": script},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "permission denied" in run.stderr.lower():
        pytest.skip("this machine allows no mount namespaces")
    assert run.returncode == 0, run.stderr
    words = run.stdout.split()
    made, found = int(words[2]), int(words[-1])
    assert made > 20
    assert found == made


# ------------------------------------------------------------------------------------------------------------- sudden end
_WRITER = """
import asyncio, pathlib, sys
from dispatcher.store import Store
from dispatcher.transitions import PodEvent
from tests.unit.store.records import make_pod

async def main():
    store = await Store.open(pathlib.Path(sys.argv[1]))
    async def work(worker):
        for number in range(100000):
            pod = await store.create_pod(make_pod(f"{worker}-{number}"))
            await store.update_pod(pod.id, PodEvent.BOOTED)
            print(pod.id, flush=True)
    await asyncio.gather(*(work(worker) for worker in range(8)))

asyncio.run(main())
"""


async def test_what_was_answered_survives_a_sudden_end(tmp_path: Path) -> None:
    """kill -9 in the middle of many commits: every pod that was reported is READY on record, none is half."""
    path = tmp_path / "state.db"
    promised: set[str] = set()
    for lines in (40, 150):
        writer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(_WRITER), str(path), stdout=subprocess.PIPE, cwd=os.getcwd()
        )
        assert writer.stdout is not None
        promised |= {(await writer.stdout.readline()).decode().strip() for _ in range(lines)}
        writer.send_signal(signal.SIGKILL)
        rest = await writer.stdout.read()
        promised |= set(rest.decode().split("\n")[:-1])
        await writer.wait()
        store = await Store.open(path)
        assert store.set_aside == ()
        assert store.condition == ""
        assert {store.get_pod(pod_id).state for pod_id in promised} == {PodState.READY}
        for pod in store.list_pods():
            await store.delete_pod(pod.id)
        await store.aclose()
        promised.clear()


def test_a_kill_at_each_commit_leaves_a_prefix(tmp_path: Path) -> None:
    """Killed right before the commit the change is missing, killed right after it the change is there."""
    script = """
import asyncio, pathlib, sys
from dispatcher.store import Store
from tests.unit.store.records import make_pod

async def main():
    store = await Store.open(pathlib.Path(sys.argv[1]))
    for number in range(5):
        await store.create_pod(make_pod(str(number)))

asyncio.run(main())
"""

    async def count(path: Path) -> int:
        store = await Store.open(path)
        try:
            return len(store.list_pods())
        finally:
            await store.aclose()

    for when, expected in (("before", 2), ("after", 3)):
        path = tmp_path / f"{when}.db"
        run = subprocess.run(
            [sys.executable, "-c", script, str(path)],
            env={**os.environ, "PYTHONPATH": os.getcwd(), "DISPATCHER_FAILPOINTS": f"store.commit:{when}=kill@3"},
            check=False,
        )
        assert run.returncode == -signal.SIGKILL
        assert asyncio.run(count(path)) == expected
