"""The real agent, with sanitizers, as process 1 of fresh namespaces on this host: what a runtime asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Any

import pytest

from dispatcher.errors import AlreadyExists, InvalidRequest, NotFound, NotSupported, WrongState
from dispatcher.model import OutputChunk
from dispatcher_hyper_vm.agent.channel import AgentAway, Session
from dispatcher_hyper_vm.agent.client import AgentClient, AgentProcess, GuestFailed
from dispatcher_hyper_vm.agent.protocol import PREAMBLE, Frame, FrameType, Message, encode
from dispatcher_hyper_vm.agent.values import ContainerState, GuestFile, PodSetup, Status
from tests.lab.agent import HostAgent, container, process

pytestmark = [pytest.mark.lab, pytest.mark.asyncio]

DEAF = "echo ready; while :; do sleep 0.05; done"


async def run(client: AgentClient, number: str, script: str, **fields: Any) -> ContainerState:
    """Create and start a shell."""
    await client.create_container(container(number, ["sh", "-c", script], **fields))
    return await client.start_container(number)


async def read(client: AgentClient, number: str, after: int = 0) -> list[OutputChunk]:
    """All output, to its end."""
    return [chunk async for chunk in client.output(number, after)]


async def said(client: AgentClient, number: str, script: str, **fields: Any) -> str:
    """What a script writes."""
    await run(client, number, script, **fields)
    return b"".join(chunk.data for chunk in await read(client, number)).decode()


async def state(client: AgentClient, number: str) -> ContainerState:
    """The state of one container."""
    return next(item for item in await client.containers() if item.id == number)


async def ended(client: AgentClient, number: str) -> ContainerState:
    """Wait for the exit."""
    async for fact in client.watch():
        for item in fact if isinstance(fact, tuple) else (fact,):
            if item.id == number and item.status is Status.EXITED:
                return item
    raise AssertionError("unreachable")


async def drain(running: AgentProcess) -> tuple[bytes, bytes, int]:
    """Both outputs and the code."""
    found = {"stdout": b"", "stderr": b""}
    async for name, data in running.output():
        found[name] += data
    code = await running.wait()
    await running.aclose()
    return found["stdout"], found["stderr"], code


# ------------------------------------------------------------------------------------------------------------- life
async def test_a_container_from_creation_to_deletion(agent: HostAgent, client: AgentClient) -> None:
    """States, output of both streams, the code; and nothing is left of it."""
    created = await client.create_container(
        container("c1", ["sh", "-c", "echo out; echo err >&2; printf end; exit 42"])
    )
    assert created.status is Status.CREATED
    started = await client.start_container("c1")
    assert started.started_at_ns > 0
    chunks = await read(client, "c1")
    assert b"".join(c.data for c in chunks if c.stream == "stdout") == b"out\nend"
    assert b"".join(c.data for c in chunks if c.stream == "stderr") == b"err\n"
    exited = await ended(client, "c1")
    assert (exited.status, exited.exit_code, exited.oom_killed) == (Status.EXITED, 42, False)
    assert exited.finished_at_ns >= started.started_at_ns
    assert exited.output_end == chunks[-1].seq == 11
    assert agent.census() == ["c1"]
    await client.delete_container("c1")
    await client.delete_container("c1")
    assert agent.census() == []
    assert await client.containers() == ()
    await client.create_container(container("c1", ["true"]))


async def test_exits_are_told_with_the_code_or_the_signal(client: AgentClient) -> None:
    """128 + signal for a death by signal; the exit comes by itself."""
    await run(client, "c1", DEAF)
    watching = asyncio.create_task(ended(client, "c1"))
    await asyncio.sleep(0)
    await client.signal_container("c1", 9)
    assert (await watching).exit_code == 137
    await client.signal_container("c1", 9)
    await run(client, "c2", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done")
    async for _chunk in client.output("c2", 0):
        await client.signal_container("c2", 15)
        break
    assert (await ended(client, "c2")).exit_code == 5


async def test_a_command_that_cannot_be_executed(client: AgentClient) -> None:
    """Exited with 128, a reason and words, as the interface of runtimes has it."""
    await client.create_container(container("c1", ["/no/such/program"]))
    found = await client.start_container("c1")
    assert (found.status, found.exit_code, found.reason) == (Status.EXITED, 128, "StartError")
    assert "/no/such/program" in found.message
    assert await read(client, "c1") == []


async def test_what_is_wrong_is_refused_at_creation(agent: HostAgent, client: AgentClient) -> None:
    """With the class of error that says what to do, and without a trace."""
    await client.create_container(container("there", ["true"]))
    with pytest.raises(AlreadyExists):
        await client.create_container(container("there", ["true"]))
    with pytest.raises(InvalidRequest):
        await client.create_container(container("../x", ["true"]))
    mount = {"destination": "/m", "type": "bind", "source": "/run/pod/vol/none", "options": ["rbind"]}
    with pytest.raises(NotFound, match="none"):
        await client.create_container(container("c1", ["true"], mounts=[mount]))
    with pytest.raises(NotSupported, match="nfs"):
        await client.create_container(container("c1", ["true"], mounts=[{"destination": "/m", "type": "nfs"}]))
    with pytest.raises(InvalidRequest, match="no capability FLY"):
        await client.create_container(container("c1", ["true"], process={"caps": ["CAP_FLY"]}))
    with pytest.raises(InvalidRequest, match="no command"):
        await client.create_container(container("c1", []))
    with pytest.raises(GuestFailed, match="seccomp"):
        await client.create_container(container("c1", ["true"], seccomp=b"\xff" * 8))
    with pytest.raises(InvalidRequest, match=r"cgroup\.procs"):
        await client.create_container(
            container("c1", ["true"], linux={"resources": {"unified": {"cgroup.procs": "1"}}})
        )
    for call in (client.start_container("none"), client.signal_container("none", 9), client.exec("none", {})):
        with pytest.raises(NotFound):
            await call
    while agent.census() != ["there"]:  # the last process of a refused creation is just going
        await asyncio.sleep(0.01)


async def test_deleting_kills_what_runs(agent: HostAgent, client: AgentClient) -> None:
    """Children and commands, too; who reads its output learns that it is gone."""
    await run(client, "c1", f"sleep 1000 & {DEAF}")
    command = await client.exec("c1", process(["sleep", "1000"]))
    await client.delete_container("c1")
    assert agent.census() == []
    with pytest.raises(NotFound):
        await read(client, "c1")
    await command.aclose()


# ----------------------------------------------------------------------------------------------------------- output
async def test_output_is_replayed_equal_after_the_daemon_died(agent: HostAgent, client: AgentClient) -> None:
    """From any position: the same borders, times and bytes, for another client as well."""
    await run(client, "c1", "i=0; while [ $i -lt 20 ]; do echo $i; i=$((i+1)); sleep 0.01; done; echo e >&2")
    chunks = await read(client, "c1")
    assert b"".join(c.data for c in chunks) == b"".join(b"%d\n" % i for i in range(20)) + b"e\n"
    await client.aclose()
    other = AgentClient(agent.socket)
    other.start()
    assert await read(other, "c1") == chunks
    for at, chunk in enumerate(chunks):
        assert await read(other, "c1", chunk.seq) == chunks[at + 1 :]
    with pytest.raises(InvalidRequest):
        await read(other, "c1", chunks[0].seq + 1 if len(chunks[0].data) > 1 else 10_000)
    await other.trim_output("c1", chunks[4].seq)
    assert await read(other, "c1", chunks[4].seq) == chunks[5:]
    with pytest.raises(InvalidRequest, match="freed"):
        await read(other, "c1", 0)
    assert (await state(other, "c1")).output_start == chunks[4].seq
    await other.aclose()


async def test_a_daemon_that_dies_while_it_reads_loses_and_doubles_nothing(
    agent: HostAgent, client: AgentClient
) -> None:
    """Clients that go away in the middle of a stream, unread data and all; each goes on where the last one stood."""
    await client.aclose()
    first = AgentClient(agent.socket)
    first.start()
    await run(first, "c1", "i=0; while [ $i -lt 30000 ]; do echo line $i; i=$((i+1)); done")
    position, found, current = 0, b"", first
    for _ in range(6):
        async for chunk in current.output("c1", position):
            found += chunk.data
            position = chunk.seq
            if len(found) % 7 == 3:
                break
        await current.aclose()
        current = AgentClient(agent.socket)
        current.start()
    found += b"".join([chunk.data for chunk in await read(current, "c1", position)])
    assert found == b"".join(b"line %d\n" % i for i in range(30000))
    await current.aclose()


async def test_a_container_waits_while_nobody_takes_its_output(client: AgentClient) -> None:
    """The buffer is bounded; what is trimmed lets it go on, and nothing is lost."""
    await run(client, "c1", "head -c 6000000 /dev/zero; echo done >&2; sleep 1000")
    full = 0
    while (now := (await state(client, "c1")).output_end) != full or not full:
        full = now
        await asyncio.sleep(0.1)
    assert 2 * 1024 * 1024 - 64 * 1024 <= full < 3 * 1024 * 1024  # a block that does not fit waits in the pipe
    total = 0
    async for chunk in client.output("c1", 0):
        total += len(chunk.data)  # "done" may come before the last zeros: it is written to another pipe
        if total >= 6000005:
            break
        await client.trim_output("c1", chunk.seq)
    assert total == 6000005


async def test_a_slow_reader_holds_nobody_else_back(client: AgentClient) -> None:
    """Streams have credit of their own; other answers overtake."""
    await run(client, "c1", "head -c 1500000 /dev/zero; sleep 1000")
    slow = client.output("c1", 0)
    await anext(slow)
    for _ in range(5):
        await client.ping()
    assert await said(client, "c2", "echo quick") == "quick\n"
    await slow.aclose()  # type: ignore[attr-defined]


async def test_output_of_a_process_that_lost_its_parent_is_complete(client: AgentClient) -> None:
    """What was written before the exit is there; what holds the pipe longer is killed, and does not delay the exit."""
    await run(client, "c1", "(sleep 1000; echo never) & echo first; exit 3", linux={"namespaces": [{"type": "mount"}]})
    assert (await ended(client, "c1")).exit_code == 3
    assert b"".join(chunk.data for chunk in await read(client, "c1")) == b"first\n"


# ---------------------------------------------------------------------------------------------------------- sessions
async def test_exec_streams_code_and_stdin(client: AgentClient) -> None:
    """Both streams apart, the exact code, half-close, and megabytes both ways."""
    await run(client, "c1", DEAF)
    assert await drain(await client.exec("c1", process(["sh", "-c", "echo o; echo e >&2; exit 7"]))) == (
        b"o\n",
        b"e\n",
        7,
    )
    cat = await client.exec("c1", process(["sh", "-c", "cat; echo end"]), stdin=True)
    data = os.urandom(1 << 21)

    async def write() -> None:
        await cat.write_stdin(data)
        await cat.close_stdin()
        await cat.close_stdin()

    writing = asyncio.create_task(write())
    out, err, code = await drain(cat)
    await writing
    assert (out == data + b"end\n", err, code) == (True, b"", 0)
    with pytest.raises(InvalidRequest, match="/no/such"):
        await client.exec("c1", process(["/no/such"]))
    early = await client.exec("c1", process(["sh", "-c", "exec <&-; echo closed; sleep 0.2"]), stdin=True)
    await early.write_stdin(bytes(1 << 20))
    assert await drain(early) == (b"closed\n", b"", 0)
    with pytest.raises(BrokenPipeError):
        await early.write_stdin(bytes(1 << 20))


async def test_exec_with_a_terminal(client: AgentClient) -> None:
    """It is one, it has a size, and it can be resized."""
    await run(client, "c1", DEAF)
    script = "tty; stty size; read line; stty size; echo got $line"
    sizes = {"consoleSize": {"width": 80, "height": 25}}
    shell = await client.exec("c1", process(["sh", "-c", script], **sizes), terminal=True, stdin=True)
    output = shell.output()
    seen = b""
    while b"25 80" not in seen:
        seen += (await anext(output))[1]
    await shell.resize(100, 40)
    await shell.write_stdin(b"word\n")
    async for _name, data in output:
        seen += data
    assert await shell.wait() == 0
    assert b"/dev/pts/0" in seen
    assert b"40 100" in seen
    assert b"got word" in seen
    await shell.resize(1, 1)


async def test_killing_a_command_takes_its_children(client: AgentClient) -> None:
    """And nothing else."""
    await run(client, "c1", DEAF)
    command = await client.exec("c1", process(["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000 & echo up; wait"]))
    async for _name, data in command.output():
        assert data == b"up\n"
        break
    await command.kill()
    await command.kill()
    assert await command.wait() == 137
    out, _, _ = await drain(await client.exec("c1", process(["sh", "-c", "ps | grep -c '[s]leep 1000'"])))
    assert out == b"0\n"


async def test_commands_end_with_the_session_and_containers_do_not(agent: HostAgent, client: AgentClient) -> None:
    """Nobody is left who could end them."""
    await run(client, "c1", DEAF)
    command = await client.exec("c1", process(["sleep", "1000"]))
    await client.aclose()
    with pytest.raises(AgentAway):
        await command.wait()
    other = AgentClient(agent.socket)
    other.start()
    while True:
        out, _, _ = await drain(await other.exec("c1", process(["sh", "-c", "ps | grep -c '[s]leep 1000'"])))
        if out == b"0\n":
            break
    assert (await state(other, "c1")).status is Status.RUNNING
    await other.aclose()


async def test_attachments(client: AgentClient) -> None:
    """Each gets all output from now on; input goes in; the end of one leaves the container alone, or not."""
    await run(client, "c1", "cat", stdin=True, stdin_once=True)
    first = await client.attach("c1", stdin=True)
    second = await client.attach("c1", stdin=False)
    await first.write_stdin(b"hello\n")
    for attached in (first, second):
        async for _name, data in attached.output():
            assert data == b"hello\n"
            break
    await second.kill()
    await second.aclose()
    assert (await state(client, "c1")).status is Status.RUNNING
    await first.close_stdin()
    assert [item async for item in first.output()] == []
    assert await first.wait() == 0
    with pytest.raises(WrongState):
        await client.attach("c1", stdin=False)
    await run(client, "c2", "read line; echo $line", stdin=True, terminal=True)
    third = await client.attach("c2", stdin=True)
    await third.write_stdin(b"word\n")
    assert b"".join([data async for _, data in third.output()]).count(b"word\r\n") == 2


async def test_connections(client: AgentClient) -> None:
    """To IPv4, else IPv6; each way closes by itself; a refusal is this connection's."""
    await run(client, "c1", "nc -ll -p 8080 -e cat & httpd -f -p [::1]:8081 & echo up; wait")
    for port, question, answer in ((8080, b"ping", b"ping"), (8081, b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.")):
        while True:
            try:
                connection = await client.connect(port)
                break
            except InvalidRequest:
                await asyncio.sleep(0.02)
        await connection.write_stdin(question)
        await connection.close_stdin()
        found = b"".join([data async for _, data in connection.output()])
        assert found.startswith(answer)
        await connection.aclose()
    with pytest.raises(InvalidRequest, match="9999"):
        await client.connect(9999)


# -------------------------------------------------------------------------------------------------- reconnection, wire
def raw(agent: HostAgent) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(agent.socket)
    connection.settimeout(20)
    return connection


def sync(nonce: bytes) -> bytes:
    return PREAMBLE + encode(Frame(type=FrameType.SYNC, payload=nonce + struct.pack("<HH", 1, 1)))


@pytest.mark.parametrize("cut", [1, 5, 31, 32, 40, 60, -1])
async def test_a_frame_that_was_cut_off_is_forgotten(agent: HostAgent, client: AgentClient, cut: int) -> None:
    """In the same stream, as where the port never told that the host had changed; it is not executed."""
    await client.aclose()
    request = encode(Frame(type=FrameType.REQUEST, id=1, seq=1, payload=Message({"command": "power_off"}).pack()))
    with contextlib.closing(raw(agent)) as connection:
        connection.sendall(sync(bytes(16)) + request[:cut] + sync(bytes(range(16))))
        found = b""
        while bytes(range(16)) not in found:
            found += connection.recv(65536)
    async with asyncio.timeout(20):
        other = AgentClient(agent.socket)
        other.start()
        await other.ping()
        await other.aclose()


async def test_one_host_at_a_time(agent: HostAgent, client: AgentClient) -> None:
    """Another waits, and gets its turn."""
    other = AgentClient(agent.socket)
    other.start()
    waiting = asyncio.create_task(other.hello())
    await client.ping()
    assert not waiting.done()
    await client.aclose()
    assert (await waiting).version == "1"
    await other.aclose()


async def test_an_unknown_command_is_unsupported(agent: HostAgent, client: AgentClient) -> None:
    """A newer host learns it by name."""
    await client.aclose()
    session = await Session.open(agent.socket, lambda _message: None)
    answer = await session.request({"command": "dance"})
    assert answer.body["error"]["code"] == "unsupported"
    await session.aclose()


# ---------------------------------------------------------------------------------------------------------- isolation
async def test_credentials(client: AgentClient) -> None:
    """Users, groups, all five sets, limits, and no new privileges; bytes that are not UTF-8 arrive."""
    user = {"uid": 1000, "gid": 1001, "additionalGids": [7, 8]}
    sets = {"bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"], "inheritable": ["CAP_KILL"]}
    fields = {
        "user": user,
        "capabilities": {**sets, "effective": ["CAP_KILL"], "ambient": ["CAP_KILL"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}],
        "env": ["PATH=/bin", "A=\udcff\udc01x".replace("\udc01", "")],
        "cwd": "/made/for/it",
        "oomScoreAdj": 500,
    }
    text = "id; grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status; ulimit -n; pwd; echo $A | od -An -tx1; cat /proc/self/oom_score_adj; hostname"
    out = await said(client, "c1", text, process=fields)
    assert "uid=1000 gid=1001 groups=7,8" in out or "uid=1000 gid=1001 groups=1001,7,8" in out
    bits = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.startswith("Cap")}
    assert bits["CapBnd:"] == f"{1 << 5 | 1:016x}"
    assert {bits[key] for key in ("CapInh:", "CapPrm:", "CapEff:", "CapAmb:")} == {f"{1 << 5:016x}"}
    assert "NoNewPrivs:\t1" in out
    assert "\n77\n/made/for/it\n ff 78 0a\n500\npod\n" in out


async def test_seccomp(client: AgentClient) -> None:
    """With and without new privileges, for the first process and for commands."""
    # if nr == mkdir: errno(EPERM) else allow
    filter_ = b"".join(
        struct.pack("<HBBI", *item)
        for item in [(0x20, 0, 0, 0), (0x15, 0, 1, 83), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
    )
    for number, no_new in (("c1", True), ("c2", False)):
        fields = {"user": {"uid": 5, "gid": 5}, "noNewPrivileges": no_new, "caps": []}
        await run(
            client,
            number,
            f"grep Seccomp: /proc/self/status; mkdir /tmp/x || echo refused; {DEAF}",
            seccomp=filter_,
            process=fields,
        )
        seen = b""
        async for chunk in client.output(number, 0):
            seen += chunk.data
            if b"ready" in seen:
                break
        assert b"Seccomp:\t2" in seen
        assert b"refused" in seen
        out, _, _ = await drain(
            await client.exec(number, process(["sh", "-c", "mkdir /tmp/y || echo refused"], **fields))
        )
        assert b"refused" in out


async def test_paths_and_devices(client: AgentClient) -> None:
    """Masked, read-only, and devices by the list: a node can be made, and is of no use."""
    linux = {
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
        "maskedPaths": ["/proc/version", "/proc/acpi", "/none"],
        "readonlyPaths": ["/proc/sys", "/none"],
        "devices": [{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o640, "gid": 4}],
        "resources": {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "r"},
            ]
        },
    }
    text = """
    wc -c < /proc/version; ls /proc/acpi | wc -l; echo 1 > /proc/sys/vm/overcommit_memory; echo code $?
    mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem; echo code $?
    mknod /tmp/sda b 8 0 && head -c 1 /tmp/sda; echo code $?
    stat -c '%a %u %g %t:%T' /dev/net/tun; true < /dev/net/tun && echo readable; true > /dev/net/tun || echo not writable
    echo x > /dev/null && head -c 2 /dev/urandom | wc -c; ls /run /home 2>&1
    """
    out = await said(client, "c1", text, linux=linux)
    assert out.startswith("0\n0\n")
    assert out.count("code 1") == 3
    assert "Read-only file system" in out
    assert out.count("Operation not permitted") >= 2
    assert "640 0 4 a:c8\nreadable\n" in out
    assert "not writable" in out


async def test_a_read_only_root(client: AgentClient) -> None:
    """Nothing can be written but where something is mounted."""
    out = await said(client, "c1", "touch /x || echo refused; touch /dev/y && echo fine", root={"readonly": True})
    assert "refused" in out
    assert "fine" in out


async def test_links_in_images_and_volumes_lead_nowhere(agent: HostAgent, client: AgentClient) -> None:
    """An image's links stay within the root, a volume's within the volume, and a working directory within both."""
    image = agent.root / "img"
    (image / "etc" / "out").symlink_to("/../../../../run/pod")
    (image / "abs").symlink_to("/etc")
    mounts = [
        {
            "destination": "/abs/sub/file",
            "type": "bind",
            "source": "/run/pod/files/etc/hosts",
            "options": ["bind", "ro"],
        }
    ]
    await client.write_files("etc", [GuestFile(path="hosts", data=b"127.0.0.1 me\n")])
    assert (
        await said(client, "c1", "cat /etc/sub/file; ls /run/pod", mounts=mounts)
        == "127.0.0.1 me\nls: /run/pod: No such file or directory\n"
    )
    await client.mount_tmpfs("vol")
    bind = {"destination": "/v", "type": "bind", "source": "/run/pod/vol/vol", "options": ["rbind"]}
    await said(client, "c2", "ln -s /proc /v/evil; ln -s ../../.. /v/up; mkdir /v/d; ln -s d /v/fine", mounts=[bind])
    for name in ("evil", "up", "../x"):
        with pytest.raises((GuestFailed, NotFound)):
            await client.create_container(
                container("c3", ["true"], mounts=[{**bind, "source": f"/run/pod/vol/vol/{name}"}])
            )
    assert await said(client, "c4", "ls -d /v", mounts=[{**bind, "source": "/run/pod/vol/vol/fine"}]) == "/v\n"


async def test_bind_mounts_keep_their_options(client: AgentClient) -> None:
    """Read-only, recursively where asked, and changes of a file in place are seen."""
    await client.write_files("etc", [GuestFile(path="hosts", data=b"one")])
    mounts = [
        {
            "destination": "/etc/hosts",
            "type": "bind",
            "source": "/run/pod/files/etc/hosts",
            "options": ["rbind", "rro", "noexec"],
        },
        {"destination": "/dev/shm", "type": "bind", "source": "/run/pod/shm", "options": ["rbind", "rw", "nosuid"]},
    ]
    await run(
        client,
        "c1",
        "echo > /etc/hosts; grep hosts /proc/mounts; echo a > /dev/shm/f; read x; cat /etc/hosts",
        mounts=mounts,
        stdin=True,
    )
    attached = await client.attach("c1", stdin=True)
    while (await state(client, "c1")).output_end < 60:
        await asyncio.sleep(0.02)
    await client.write_files("etc", [GuestFile(path="hosts", data=b"two")])
    await attached.write_stdin(b"\n")
    out = b"".join(chunk.data for chunk in await read(client, "c1")).decode()
    assert "Read-only file system" in out
    assert "/etc/hosts tmpfs ro,nosuid,noexec" in out
    assert out.endswith("two")
    assert await said(client, "c2", "cat /dev/shm/f", mounts=mounts[1:]) == "a\n"


async def test_process_namespaces(agent: HostAgent, client: AgentClient) -> None:
    """Its own, another container's, or the pod's, whose first process reaps."""
    out = await said(client, "own", "echo $$")
    assert out == "1\n"
    await run(client, "target", "exec sleep 1234")
    linux = {"namespaces": [{"type": "pid", "path": "container:target"}, {"type": "mount"}]}
    assert "sleep 1234" in await said(client, "debug", "ps", linux=linux)
    await client.aclose()
    other = AgentClient(agent.socket)
    other.start()
    await other.setup(PodSetup(hostname="pod", shares_pid_namespace=True))
    linux = {"namespaces": [{"type": "pid", "path": "pod"}, {"type": "mount"}]}
    await run(other, "a", "exec sleep 4321", linux=linux)
    out = await said(
        other, "b", "ps; (sleep 0.01 &); sleep 0.1; grep -l 'State:.Z' /proc/[0-9]*/status | wc -l", linux=linux
    )
    assert "sleep 4321" in out
    assert "sleep 1234" not in out
    assert out.endswith("\n0\n")
    assert (await state(other, "a")).status is Status.RUNNING
    await other.signal_container("a", 9)
    assert (await ended(other, "a")).exit_code == 137
    await other.aclose()


# -------------------------------------------------------------------------------------------------------------- files
async def test_files_are_swapped_as_one_act(client: AgentClient) -> None:
    """Readers see one generation or the other; what is gone disappears; a large set goes in parts."""
    files = [GuestFile(path="a", data=b"1"), GuestFile(path="d/b", data=b"1", mode=0o400, uid=5, gid=6)]
    await client.write_files("cm", files, atomic=True)
    mount = {"destination": "/cm", "type": "bind", "source": "/run/pod/files/cm", "options": ["rbind", "ro"]}
    script = """
    stat -c '%a %u %g' /cm/d/b /cm/..data/d/b; readlink /cm/a
    while :; do x=$(cat /cm/a); y=$(cat /cm/..data/a); [ "$x" = 2 ] && break; sleep 0.01; done
    ls -A /cm | grep -v '^\\.\\.[0-9a-f]*$'; wc -c < /cm/big; echo > /cm/a
    """
    await run(client, "c1", script, mounts=[mount])
    big = os.urandom(5 << 20)
    await client.write_files(
        "cm",
        [
            GuestFile(path="big", data=big[: 3 << 20]),
            GuestFile(path="a", data=b"2"),
            GuestFile(path="big2", data=big[: 1 << 20]),
        ],
        atomic=True,
    )
    out = b"".join(chunk.data for chunk in await read(client, "c1")).decode()
    assert out.startswith("400 5 6\n400 5 6\n..data/a\n")
    assert "..data\na\nbig\nbig2\n3145728\n" in out
    assert "Read-only" in out
    for path in ("../x", "/x", "a/../../x", "..data/x", ""):
        with pytest.raises(InvalidRequest):
            await client.write_files("cm", [GuestFile(path=path)])
    with pytest.raises(InvalidRequest):
        await client.write_files("../cm", [])
    await client.remove_files("cm")
    await client.remove_files("cm")


async def test_volumes(client: AgentClient) -> None:
    """Mounted once, not unmounted while in use, gone afterwards."""
    await client.mount_tmpfs("v", size_bytes=1 << 20, mode=0o757, uid=3, gid=4)
    await client.mount_tmpfs("v")
    mount = {"destination": "/v", "type": "bind", "source": "/run/pod/vol/v", "options": ["rbind"]}
    out = await said(
        client, "c1", "stat -c '%a %u %g' /v; head -c 2000000 /dev/zero > /v/f || echo full", mounts=[mount]
    )
    assert out.startswith("757 3 4\n")
    assert "full" in out
    figures = await client.stats()
    assert [(item.name, item.capacity_bytes) for item in figures.volumes] == [("v", 1 << 20)]
    assert figures.volumes[0].used_bytes == 1 << 20
    await client.unmount("v")
    await client.unmount("v")
    with pytest.raises(NotFound):
        await client.create_container(container("c2", ["true"], mounts=[mount]))


async def test_figures(client: AgentClient) -> None:
    """Everything is there, also where the kernel of this host measures less than a guest's."""
    await run(client, "c1", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000")
    while (figures := await client.stats()).containers[0].usage.cpu_usage_ns == 0:
        await asyncio.sleep(0.05)
    assert figures.containers[0].id == "c1"
    assert 0 < figures.agent_rss_bytes < 1 << 30
    assert figures.memory_available_bytes <= figures.memory_total_bytes
    assert figures.time_ns > 0


async def test_network(client: AgentClient) -> None:
    """Without a device it is said by number; loopback is up."""
    from dispatcher_hyper_vm.agent.values import Interface, Route

    with pytest.raises(NotFound, match="network device 0"):
        await client.setup(PodSetup(interfaces=(Interface(name="eth0"),)))
    with pytest.raises(NotFound, match="no interface"):
        await client.setup(PodSetup(routes=(Route(to="0.0.0.0/0", device="eth0", via="10.0.0.1"),)))
    assert "127.0.0.1" in await said(client, "c1", "ip addr show lo")
