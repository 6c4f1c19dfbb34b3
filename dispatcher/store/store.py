"""The store: every read answered from memory, every change durable before anyone can see it.

Theory of operation. Memory holds immutable records. A change is computed on the loop from the newest version that was
*submitted* (the head), so that two callers never overwrite each other, and is queued. One thread writes everything
that is queued as one transaction; while it writes, the next batch gathers. Only when a transaction is on disk do its
records enter memory, subscribers hear of it, and the callers go on. When a transaction fails, everything queued behind
it fails too (it may have been computed from what failed), and memory is set to what the file then really holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, cast

from dispatcher.errors import AlreadyExists, Internal, NotFound
from dispatcher.model import (
    ContainerId,
    ContainerMetadata,
    ContainerRecord,
    PodId,
    PodMetadata,
    PodRecord,
)
from dispatcher.model.records import RECORD_SCHEMA
from dispatcher.store.codec import CONTAINER_CODEC, POD_CODEC, Codec, R, SetAside, UnreadableError
from dispatcher.store.database import (
    MIGRATIONS,
    Database,
    Delete,
    Migration,
    Operation,
    Row,
    Setting,
    StoreUnusableError,
)
from dispatcher.transitions import ContainerEvent, PodEvent, next_container_state, next_pod_state

Record: TypeAlias = PodRecord | ContainerRecord
Subscriber: TypeAlias = Callable[[Record | None, Record | None], None]
Key: TypeAlias = tuple[str, str]
OnCommit: TypeAlias = Callable[[float, int], None]

_log = logging.getLogger(__name__)
_FIXED = frozenset({"id", "version", "schema", "state", "spec", "pod_id", "created_at_ns", "fingerprint"})


class _Table(Generic[R]):
    """The records of one kind in memory, with an index by identity."""

    def __init__(self, kind: str, noun: str, codec: Codec[R], identity: Callable[[R], object]) -> None:
        self.kind = kind
        self.noun = noun
        self.codec: Codec[R] = codec
        self.identity: Callable[[R], object] = identity
        self.records: dict[str, R] = {}
        self.ids: dict[object, str] = {}

    def apply(self, record_id: str, new: R | None) -> R | None:
        """Set or drop a record; return what stood there."""
        old = self.records.get(record_id)
        if new is not None:
            self.records[record_id] = new
            self.ids[self.identity(new)] = record_id
        elif old is not None:
            del self.records[record_id]
            self.ids.pop(self.identity(old), None)
        return old

    def get(self, record_id: str) -> R:
        try:
            return self.records[record_id]
        except KeyError:
            raise self.not_found(record_id) from None

    def not_found(self, record_id: str) -> NotFound:
        return NotFound(f"There is no {self.noun} {record_id[:64]!r}.", id=record_id)

    def resolve(self, prefix: str) -> str | None:
        if not prefix:
            return None
        if prefix in self.records:
            return prefix
        found = None
        for record_id in self.records:
            if record_id.startswith(prefix):
                if found is not None:
                    return None
                found = record_id
        return found

    def row(self, record: R) -> Row:
        return Row(self.kind, record.id, record.version, record.schema, self.codec.encode(record))


@dataclass(slots=True)
class _Write:
    """Operations that go to disk together, and what they mean in memory."""

    operations: tuple[Operation, ...]
    changes: tuple[tuple[Key, Record | None], ...]
    done: asyncio.Future[None]


class Store:
    """See the module. Made by `Store.open`; to be used from one event loop only.

    `set_aside` lists rows that could not be read, `condition` is a sentence when the file was damaged ("" else).
    """

    def __init__(self, database: Database, executor: ThreadPoolExecutor, on_commit: OnCommit) -> None:
        self._database = database
        self._on_commit = on_commit
        self._executor = executor
        self._pods: _Table[PodRecord] = _Table("pod", "pod sandbox", POD_CODEC, lambda record: record.spec.metadata)
        self._containers: _Table[ContainerRecord] = _Table(
            "container", "container", CONTAINER_CODEC, lambda record: (record.pod_id, record.spec.metadata)
        )
        self._of_pod: dict[str, dict[str, None]] = {}
        self._settings: dict[str, Any] = {}
        self._heads: dict[Key, tuple[Record | None, _Write]] = {}
        self._setting_heads: dict[str, tuple[Any, _Write]] = {}
        self._queue: list[_Write] = []
        self._committer: asyncio.Task[None] | None = None
        self._subscribers: list[Subscriber] = []
        self._closed = False
        self.set_aside: tuple[SetAside, ...] = ()
        self.condition = database.damage

    # ----------------------------------------------------------------------------------------------- open and close
    @classmethod
    async def open(
        cls,
        path: Path | str | None,
        *,
        migrations: Sequence[Migration] = MIGRATIONS,
        on_commit: OnCommit = lambda _seconds, _operations: None,
    ) -> Store:
        """Open or make the database file and read everything. `path` of None keeps all in memory, for tests.

        `on_commit(seconds, operations)` hears of each batch that is on disk.

        Raises:
            StoreUnusableError: in use by another daemon, newer than this version, damaged beyond reading, or not
                writable; the message says what to do.
        """
        executor = ThreadPoolExecutor(1, thread_name_prefix="store")
        loop = asyncio.get_running_loop()
        try:
            file = Path(path) if path is not None else None
            database = await loop.run_in_executor(executor, lambda: Database(file, migrations))
            store = cls(database, executor, on_commit)
            try:
                await store._load()
            except BaseException:
                await loop.run_in_executor(executor, database.close)
                raise
        except BaseException:
            executor.shutdown(wait=False)
            raise
        return store

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._executor, self._database.rows)
        newest = max((row.schema for row in rows), default=0)
        if newest > RECORD_SCHEMA:
            raise StoreUnusableError(
                f"The state database holds records of schema {newest} and this version reads up to {RECORD_SCHEMA}: "
                f"install the newer version again. Running pods were left alone."
            )
        unreadable: list[tuple[Row, str]] = []
        pods = self._decode(self._pods, rows, unreadable)
        containers = self._decode(self._containers, rows, unreadable)
        unreadable += [(row, "unknown kind of record") for row in rows if row.kind not in ("pod", "container")]
        for pod in sorted(pods, key=lambda record: (record.created_at_ns, record.id)):
            self._apply(("pod", pod.id), pod)
        for container in sorted(containers, key=lambda record: (record.created_at_ns, record.id)):
            if container.pod_id in self._pods.records:
                self._apply(("container", container.id), container)
            else:
                unreadable.append((self._containers.row(container), f"its pod {container.pod_id} is not on record"))
        for setting in await loop.run_in_executor(self._executor, self._database.settings):
            with contextlib.suppress(ValueError):
                self._settings[setting.key] = json.loads(setting.value)
        if unreadable:
            await loop.run_in_executor(self._executor, self._database.put_aside, unreadable)
        aside = await loop.run_in_executor(self._executor, self._database.aside)
        self.set_aside = tuple(SetAside(kind=row[0], id=row[1], reason=row[2], at_ns=row[3]) for row in aside)
        for row, reason in unreadable:
            _log.error("record set aside", extra={"kind": row.kind, "record": row.id, "reason": reason})

    @staticmethod
    def _decode(table: _Table[R], rows: Iterable[Row], unreadable: list[tuple[Row, str]]) -> list[R]:
        records = []
        for row in rows:
            if row.kind != table.kind:
                continue
            try:
                record = table.codec.decode(row.body)
            except UnreadableError as error:
                unreadable.append((row, str(error)))
                continue
            if record.id == row.id:
                records.append(record)
            else:
                unreadable.append((row, f"the record names itself {record.id[:64]!r}"))
        return records

    async def aclose(self) -> None:
        """Write what is queued and close the file. Later changes raise Internal; reads go on. Idempotent."""
        self._closed = True
        while self._committer is not None and not self._committer.done():
            await asyncio.wait([self._committer])
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError):  # the executor is gone: closed before
            await loop.run_in_executor(self._executor, self._database.close)
        self._executor.shutdown(wait=False)

    # --------------------------------------------------------------------------------------------------------- reads
    def find_pod(self, pod_id: str) -> PodRecord | None:
        """Return the pod with exactly this id, or None."""
        return self._pods.records.get(pod_id)

    def get_pod(self, pod_id: str) -> PodRecord:
        """Return the pod with exactly this id. Raises NotFound."""
        return self._pods.get(pod_id)

    def list_pods(self) -> tuple[PodRecord, ...]:
        """Return all pods, oldest first."""
        return tuple(self._pods.records.values())

    def find_pod_by_identity(self, metadata: PodMetadata) -> PodRecord | None:
        """Return the pod with this name, namespace, uid and attempt, in whatever state, or None."""
        pod_id = self._pods.ids.get(metadata)
        return self._pods.records[pod_id] if pod_id is not None else None

    def resolve_pod_id(self, prefix: str) -> PodId | None:
        """Return the id that equals `prefix` or is the only one to begin with it. None for "" and for ambiguity."""
        found = self._pods.resolve(prefix)
        return PodId(found) if found is not None else None

    def find_container(self, container_id: str) -> ContainerRecord | None:
        """Return the container with exactly this id, or None."""
        return self._containers.records.get(container_id)

    def get_container(self, container_id: str) -> ContainerRecord:
        """Return the container with exactly this id. Raises NotFound."""
        return self._containers.get(container_id)

    def list_containers(self, pod_id: str | None = None) -> tuple[ContainerRecord, ...]:
        """Return all containers, or those of one pod (none for an unknown pod), oldest first."""
        if pod_id is None:
            return tuple(self._containers.records.values())
        return tuple(self._containers.records[container_id] for container_id in self._of_pod.get(pod_id, ()))

    def find_container_by_identity(self, pod_id: str, metadata: ContainerMetadata) -> ContainerRecord | None:
        """Return the container of this pod with this name and attempt, in whatever state, or None."""
        container_id = self._containers.ids.get((pod_id, metadata))
        return self._containers.records[container_id] if container_id is not None else None

    def resolve_container_id(self, prefix: str) -> ContainerId | None:
        """Return the id that equals `prefix` or is the only one to begin with it. None for "" and for ambiguity."""
        found = self._containers.resolve(prefix)
        return ContainerId(found) if found is not None else None

    def get_setting(self, key: str) -> Any:
        """Return a setting's JSON value, None where it was never set."""
        return self._settings.get(key)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Have `subscriber(old, new)` called on the loop after each durable change; return what ends that.

        `old` is None for a new record, `new` None for a deleted one. It must not block; what it raises is logged.
        """
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(subscriber)

        return unsubscribe

    # ------------------------------------------------------------------------------------------------------- changes
    # A caller that is cancelled while it waits leaves its change in the queue: it will be written, or not, as one.
    async def create_pod(self, record: PodRecord) -> PodRecord:
        """Put a new pod on record and return it as committed.

        Raises:
            AlreadyExists: a pod on record has this id or this identity.
        """
        self._refuse_taken(self._pods, record)
        return await self._put(self._pods, replace(record, version=1, schema=RECORD_SCHEMA))

    async def create_container(self, record: ContainerRecord) -> ContainerRecord:
        """Put a new container on record and return it as committed.

        Raises:
            AlreadyExists: a container on record has this id, or this identity within its pod.
            NotFound: its pod is not on record.
        """
        if self._head(self._pods, record.pod_id) is None:
            raise self._pods.not_found(record.pod_id)
        self._refuse_taken(self._containers, record)
        return await self._put(self._containers, replace(record, version=1, schema=RECORD_SCHEMA))

    async def update_pod(self, pod_id: str, event: PodEvent | None = None, /, **changes: Any) -> PodRecord:
        """Take the step `event` and set the fields in `changes`, as one, and return the new record.

        Nothing is written when nothing changes. Returns when the record is durable, and visible to readers.

        Raises:
            NotFound: no such pod.
            WrongState: the pod cannot take this step now.
        """
        record = self._head(self._pods, pod_id)
        if record is None:
            raise self._pods.not_found(pod_id)
        state = next_pod_state(record.state, event) if event is not None else record.state
        return await self._advance(self._pods, record, {**_allowed(changes), "state": state})

    async def update_container(
        self, container_id: str, event: ContainerEvent | None = None, /, **changes: Any
    ) -> ContainerRecord:
        """Take the step `event` and set the fields in `changes`, as one, and return the new record.

        Nothing is written when nothing changes. Returns when the record is durable, and visible to readers.

        Raises:
            NotFound: no such container.
            WrongState: the container cannot take this step now.
        """
        record = self._head(self._containers, container_id)
        if record is None:
            raise self._containers.not_found(container_id)
        state = next_container_state(record.state, event) if event is not None else record.state
        return await self._advance(self._containers, record, {**_allowed(changes), "state": state})

    async def delete_pod(self, pod_id: str) -> None:
        """Forget a pod and all of its containers, as one. Idempotent."""
        if self._head(self._pods, pod_id) is None:
            await self._settled(("pod", pod_id))
            return
        keys: list[Key] = [("container", container_id) for container_id in self._of_pod.get(pod_id, ())]
        keys += [
            key
            for key, (head, _) in self._heads.items()
            if isinstance(head, ContainerRecord) and head.pod_id == pod_id and key not in keys
        ]
        await self._delete([*keys, ("pod", pod_id)])

    async def delete_container(self, container_id: str) -> None:
        """Forget a container. Idempotent."""
        if self._head(self._containers, container_id) is None:
            await self._settled(("container", container_id))
            return
        await self._delete([("container", container_id)])

    async def set_setting(self, key: str, value: Any) -> None:
        """Write a setting, durably. `value` is plain JSON."""
        head = self._setting_heads.get(key)
        if head is not None and head[0] == value:
            await _wait(head[1])
            return
        if head is None and key in self._settings and self._settings[key] == value:
            return
        text = json.dumps(value, separators=(",", ":"))
        write = self._enqueue((Setting(key, text),), ())
        self._setting_heads[key] = (json.loads(text), write)
        await _wait(write)

    # ----------------------------------------------------------------------------------------------------- machinery
    def _head(self, table: _Table[R], record_id: str) -> R | None:
        """Return the newest submitted version, None where there is none or its deletion is submitted."""
        head = self._heads.get((table.kind, record_id))
        return cast("R | None", head[0]) if head is not None else table.records.get(record_id)

    def _refuse_taken(self, table: _Table[R], record: R) -> None:
        identity = table.identity(record)
        owner = table.ids.get(identity)
        if owner is not None and self._head(table, owner) is None:
            owner = None  # its deletion is queued in front of us
        for (kind, head_id), (head, _) in self._heads.items():
            if kind == table.kind and head is not None and table.identity(cast("R", head)) == identity:
                owner = head_id
        if owner is None and self._head(table, record.id) is not None:
            owner = record.id
        if owner is not None:
            raise AlreadyExists(f"This {table.noun} is on record already, as {owner}.", id=owner)

    async def _advance(self, table: _Table[R], record: R, changes: dict[str, Any]) -> R:
        if all(getattr(record, name) == value for name, value in changes.items()):
            await self._settled((table.kind, record.id))
            return record
        return await self._put(table, replace(record, version=record.version + 1, schema=RECORD_SCHEMA, **changes))

    async def _put(self, table: _Table[R], record: R) -> R:
        key = (table.kind, record.id)
        write = self._enqueue((table.row(record),), ((key, record),))
        await _wait(write)
        return record

    async def _delete(self, keys: Sequence[Key]) -> None:
        write = self._enqueue(tuple(Delete(*key) for key in keys), tuple((key, None) for key in keys))
        await _wait(write)

    async def _settled(self, key: Key) -> None:
        """Wait until the newest submitted version is durable: who changes nothing may still rely on what stands."""
        head = self._heads.get(key)
        if head is not None:
            await _wait(head[1])

    def _enqueue(self, operations: tuple[Operation, ...], changes: tuple[tuple[Key, Record | None], ...]) -> _Write:
        if self._closed:
            raise Internal("The dispatcher is stopping: its record is closed.")
        loop = asyncio.get_running_loop()
        write = _Write(operations, changes, loop.create_future())
        write.done.add_done_callback(_retrieve)
        for key, record in changes:
            self._heads[key] = (record, write)
        self._queue.append(write)
        if self._committer is None or self._committer.done():
            self._committer = loop.create_task(self._commit_queue(), name="store-commit")
        return write

    async def _commit_queue(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch, self._queue = self._queue, []
            operations = [operation for write in batch for operation in write.operations]
            began = time.perf_counter()
            try:
                await loop.run_in_executor(self._executor, self._database.commit, operations)
            except Exception as error:  # noqa: BLE001 - handed to every caller that waits
                await self._fail(batch, error)
                continue
            self._on_commit(time.perf_counter() - began, len(operations))
            for write in batch:
                self._settle(write)
            for write in batch:
                if not write.done.done():
                    write.done.set_result(None)

    def _settle(self, write: _Write) -> None:
        for key, record in write.changes:
            if self._heads.get(key, (None, None))[1] is write:
                del self._heads[key]
            self._publish(key, record)
        for operation in write.operations:
            if isinstance(operation, Setting):
                if self._setting_heads.get(operation.key, (None, None))[1] is write:
                    del self._setting_heads[operation.key]
                self._settings[operation.key] = json.loads(operation.value)

    async def _fail(self, batch: list[_Write], error: Exception) -> None:
        """Fail a batch and all behind it, and set memory to what the file holds: a commit may fail after the act."""
        loop = asyncio.get_running_loop()
        keys = {key for write in batch for key, _ in write.changes}
        with contextlib.suppress(Exception):  # unreadable too: memory keeps what was last known to be durable
            for key, row in (await loop.run_in_executor(self._executor, self._database.read, keys)).items():
                known = self._table(key).records.get(key[1])
                if row is None:
                    if known is not None:
                        self._publish(key, None)
                elif known is None or known.version != row.version:
                    self._publish(key, self._table(key).codec.decode(row.body))
        batch, self._queue = batch + self._queue, []
        self._heads.clear()
        self._setting_heads.clear()
        _log.error("commit failed", exc_info=error, extra={"changes": len(batch)})
        for write in batch:
            if not write.done.done():
                write.done.set_exception(error)

    def _table(self, key: Key) -> _Table[Any]:
        return self._pods if key[0] == "pod" else self._containers

    def _apply(self, key: Key, record: Record | None) -> Record | None:
        old: Record | None = self._table(key).apply(key[1], record)
        if isinstance(record, ContainerRecord):
            self._of_pod.setdefault(record.pod_id, {})[record.id] = None
        elif record is None and isinstance(old, ContainerRecord):
            siblings = self._of_pod.get(old.pod_id, {})
            siblings.pop(old.id, None)
            if not siblings:
                self._of_pod.pop(old.pod_id, None)
        return old

    def _publish(self, key: Key, record: Record | None) -> None:
        old = self._apply(key, record)
        if old is None and record is None:
            return
        for subscriber in tuple(self._subscribers):
            try:
                subscriber(old, record)
            except Exception:  # noqa: BLE001 - durable already: a listener's bug is no failed commit
                _log.exception("subscriber failed", extra={"kind": key[0], "record": key[1]})


def _allowed(changes: dict[str, Any]) -> dict[str, Any]:
    if fixed := _FIXED & changes.keys():
        raise TypeError(f"{', '.join(sorted(fixed))} of a record cannot be set")
    return changes


async def _wait(write: _Write) -> None:
    await asyncio.shield(write.done)


def _retrieve(done: asyncio.Future[None]) -> None:
    """Look at the outcome, so that asyncio does not complain when the caller was cancelled and nobody else does."""
    if not done.cancelled():
        done.exception()
