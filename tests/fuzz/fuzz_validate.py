"""Requests from anywhere: each is refused with a sentence, or becomes values that nothing later can stumble over."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import validate
from dispatcher.errors import InvalidRequest
from dispatcher.model import ContainerSpec, Image, ImageConfig, ImageId, NamespaceMode, PodSpec, Resources
from dispatcher.policy.facts import facts_of_container, facts_of_pod
from dispatcher.store.codec import Codec
from tests.fuzz.harness import Fuzzer, finds

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]

# The first byte of an input chooses what the rest is read as.
MESSAGES: list[type[Message]] = [
    pb.RunPodSandboxRequest,
    pb.CreateContainerRequest,
    pb.UpdateContainerResourcesRequest,
    pb.PullImageRequest,
    pb.ExecSyncRequest,
    pb.ExecRequest,
]
TEXTS = [
    *(
        "",
        "a",
        "web",
        "default",
        "/",
        "/a",
        "/a/../b",
        "..",
        "../x",
        "a/b",
        "/proc",
        "//etc",
        "\u0000",
        "a\nb",
        "\x1b[2J",
    ),
    *("ä", "x" * 70, "net.ipv4.ip_forward", "kernel.shmmax", "kernel.panic", "net/../x", "memory.max", "../memory.max"),
    *("SYS_ADMIN", "CAP_ALL", "ALL", "rwm", "x", "vendor.com/gpu=0", "0-3,7", "1-", "2MB", "2Mi", "127.0.0.1", "::1"),
    *("fe80::1%eth0", "localhost/x", "runtime/default", "unconfined", "localhost/", "kubepods.slice", "/kubepods/a"),
    *("A=B", "root", "root:x", "-rf", "$(id)", "noexec", "remount", "%s", "{}", "user_u", "s0:c1,c2"),
]
NUMBERS = [
    0,
    1,
    2,
    3,
    -1,
    4,
    80,
    65535,
    65536,
    100_000,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**63 - 1,
    -(2**63),
    1000,
    -1001,
]
TOKENS = [text.encode() for text in TEXTS if len(text) > 1]

# The codec of records, for the parts of records that come from a request.
_POD, _CONTAINER = Codec(PodSpec), Codec(ContainerSpec)  # type: ignore[type-var]
_IMAGE = Image(
    id=ImageId("sha256:" + "0" * 64), repo_tags=("a:1",), repo_digests=(), size_bytes=1, config=ImageConfig()
)


def check_request(data: bytes) -> str:
    """The property: InvalidRequest with a bounded sentence, or values that hold what later code relies on."""
    if not data:
        return "empty"
    kind = MESSAGES[data[0] % len(MESSAGES)]
    try:
        message: Any = kind.FromString(data[1:])
    except DecodeError:
        return "no message"
    try:
        return f"{kind.__name__} {_take(message)}"
    except InvalidRequest as error:
        refusal = error
    assert 0 < len(refusal.message) < 3 * (1 << 16)
    # What is said, without what the request holds: so that new contents are no news.
    return re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|[^A-Za-z_ ]+", "", refusal.message.partition(" '")[0])[:32]


def _take(message: Any) -> str:
    """Do with a request what its handler does first."""
    if isinstance(message, pb.RunPodSandboxRequest):
        pod = validate.pod_spec(message.config, message.runtime_handler)
        _hold_pod(pod)
        return f"{pod.uses_host_network} {bool(pod.sysctls)} {pod.dns is None}"
    if isinstance(message, pb.CreateContainerRequest):
        pod = validate.pod_spec(message.sandbox_config)
        container = validate.container_spec(message.config, pod)
        _hold_container(container, pod)
        return f"{len(container.mounts)} {bool(container.devices)} {container.security.privileged}"
    if isinstance(message, pb.UpdateContainerResourcesRequest):
        _hold_resources(validate.resources(message.linux))
        return "resources"
    if isinstance(message, pb.PullImageRequest):
        credentials = validate.credentials(message.auth)
        secret = message.auth.password
        assert len(secret) < 4 or secret not in repr(credentials) or secret in message.auth.server_address
        return "credentials"
    if isinstance(message, pb.ExecSyncRequest):
        assert all("\0" not in word for word in validate.command(message.cmd))
        return "command"
    validate.exec_streams(message)
    assert message.stdin or message.stdout or message.stderr
    return "streams"


def _paths(paths: Iterable[str]) -> None:
    for path in paths:
        assert not path or path.startswith("/"), path
        assert ".." not in path.split("/")
        assert "\0" not in path


def _hold_pod(pod: PodSpec) -> None:
    assert pod.metadata.name
    assert pod.metadata.uid
    assert pod.metadata.namespace
    assert len(pod.hostname) <= 64
    assert not re.search(r"[/\s\x00-\x1f\x7f]", pod.hostname)
    _paths([pod.log_directory])
    assert ".." not in pod.cgroup_parent
    assert re.fullmatch(r"[\w.:/@\\-]*", pod.cgroup_parent, re.ASCII)
    for name, value in pod.sysctls.items():
        assert re.fullmatch(r"[\w:*-]+(\.[\w:*-]+)+", name, re.ASCII), name
        assert "\n" not in value
        assert name.startswith(("net.", "kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")), name
        assert not (name.startswith("net.") and pod.uses_host_network)
    for port in pod.port_mappings:
        assert 0 < port.container_port < 65536
        assert 0 <= port.host_port < 65536
    for word in (*pod.dns.servers, *pod.dns.searches, *pod.dns.options) if pod.dns else ():
        assert not re.search(r"[\s\x00-\x1f]", word)
    assert pod.security.namespaces.pid is not NamespaceMode.TARGET
    for resources in (pod.overhead, pod.resources):
        if resources is not None:
            _hold_resources(resources)
    _same(_POD, pod)
    facts_of_pod(pod)


def _hold_container(container: ContainerSpec, pod: PodSpec) -> None:
    assert container.metadata.name
    assert container.image_ref
    assert not (container.security.privileged and not pod.security.privileged)
    assert all("\0" not in word for word in (*container.command, *container.args))
    assert not container.log_path.startswith(("/", ".."))
    assert "/../" not in container.log_path
    for env in container.envs:
        assert env.key
        assert "=" not in env.key
        assert b"\0" not in env.value
    for mount in container.mounts:
        _paths([mount.container_path, mount.host_path])
        assert (mount.image is None) == bool(mount.host_path)
    for device in container.devices:
        _paths([device.container_path, device.host_path])
        assert set(device.permissions) <= set("rwm")
        assert device.permissions
    _paths(
        [container.working_dir, *(container.security.masked_paths or ()), *(container.security.readonly_paths or ())]
    )
    assert all(re.fullmatch(r"[A-Z_]+", name) for name in container.security.capabilities.add)
    if container.resources is not None:
        _hold_resources(container.resources)
    _same(_CONTAINER, container)
    facts_of_container(container, _IMAGE, "docker")


def _hold_resources(resources: Resources) -> None:
    assert resources.memory_limit_bytes >= 0
    assert -1000 <= resources.oom_score_adj <= 1000
    assert not re.search(r"[^0-9,-]", resources.cpuset_cpus + resources.cpuset_mems)
    for key, value in resources.unified.items():
        assert "/" not in key
        assert not key.startswith(".")
        assert "\n" not in value


def _same(codec: Codec[Any], value: Any) -> None:
    """What was accepted can be put on record and read back."""
    assert codec.decode(codec.encode(value)) == value


def generate(chance: random.Random) -> bytes:
    """A request whose parts are mostly plausible."""
    index = chance.randrange(len(MESSAGES)) if chance.random() < 0.3 else chance.randrange(2)
    message: Any = MESSAGES[index]()
    _fill(message, chance, 4)
    config = message.config if index == 0 else message.sandbox_config if index == 1 else None
    if config is not None and chance.random() < 0.9:
        config.ClearField("windows")
        config.metadata.name, config.metadata.namespace, config.metadata.uid = "web", "default", "u"
        if chance.random() < 0.8:  # so that what comes later is reached
            config.linux.ClearField("sysctls")
            config.ClearField("dns_config")
            config.linux.security_context.ClearField("selinux_options")
            config.log_directory = config.linux.cgroup_parent = ""
            config.hostname = "web"
            config.linux.security_context.privileged = True
    if index == 1 and chance.random() < 0.9:
        message.config.ClearField("windows")
        message.config.metadata.name = message.config.image.image = "a"
    return bytes([index]) + bytes(message.SerializeToString())


def _fill(message: Any, chance: random.Random, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.6:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = getattr(message, field.name)
            for _ in range(chance.randrange(3)):
                entry[chance.choice(TEXTS)] = chance.choice(TEXTS)
        elif field.message_type is not None:
            if not depth:
                continue
            if field.is_repeated:
                for _ in range(chance.randrange(3)):
                    _fill(getattr(message, field.name).add(), chance, depth - 1)
            else:
                inner = getattr(message, field.name)
                inner.SetInParent()
                _fill(inner, chance, depth - 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(_value(field, chance) for _ in range(chance.randrange(3)))
        else:
            setattr(message, field.name, _value(field, chance))


def _value(field: FieldDescriptor, chance: random.Random) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = chance.choice(TEXTS)
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return chance.choice([0, 1, 2, 3, 99])
    limits = {
        FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
        FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
        FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
        FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    }
    low, high = limits[kind]
    return chance.choice([number for number in NUMBERS if low <= number <= high])


def make_fuzzer(**changes: Any) -> Fuzzer:
    """The fuzzer of requests."""
    return Fuzzer(check=check_request, corpus="validate", tokens=TOKENS, generate=generate, **changes)


def test_requests_are_refused_or_harmless() -> None:
    """Nothing but InvalidRequest is ever raised, and what passes cannot climb, inject or be lost on record."""
    print(make_fuzzer().run())


def _any_path(path: str, _what: str) -> str:
    return path


def _any_number(table: dict[Any, Any], value: int, _what: str) -> Any:
    return table[value]


def _any_sysctls(sysctls: Any, _namespaces: Any) -> dict[str, str]:
    return dict(sysctls)


PLANTED: list[tuple[str, Callable[..., Any]]] = [
    ("_absolute_or_empty", _any_path),  # paths that climb
    ("_enum", _any_number),  # an unknown number of an enum
    ("_sysctls", _any_sysctls),  # sysctls of the whole node
]


@pytest.mark.parametrize(("name", "replacement"), PLANTED, ids=[name for name, _ in PLANTED])
def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any) -> None:
    """Each is caught within seconds."""
    monkeypatch.setattr(validate, name, replacement)
    finds(make_fuzzer(seconds=30, seed=1), name)
