"""Network configurations from anywhere: each is refused with a sentence, or used without surprise."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from typing import Any

import pytest

from dispatcher.model import NetworkPlan
from dispatcher_cni import conflist
from dispatcher_cni.conflist import BadConfig, NetworkConfig, parse_list, parse_single
from dispatcher_cni.plan import AttachmentPlan
from dispatcher_cni.request import make_environment, make_gc_input, make_input
from tests.fuzz.harness import Fuzzer, finds

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]

KEYS = [
    "name",
    "cniVersion",
    "cniVersions",
    "plugins",
    "type",
    "ipam",
    "capabilities",
    "disableCheck",
    "disableGC",
    "loadOnlyInlinedPlugins",
    "portMappings",
    "runtimeConfig",
    "prevResult",
    "dns",
    "args",
    "ranges",
    "subnet",
]
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        1.5,
        1e308,
        10**30,
        "",
        "x",
        "net",
        "bridge",
        "host-local",
        "../x",
        "a/b",
        ".",
        "..",
    ),
    *(
        "1.0.0",
        "1.1.0",
        "0.4.0",
        "9.9.9",
        "1.0",
        "true",
        "False",
        "\u0000",
        "\udcff",
        "ä",
        [],
        {},
        ["1.0.0"],
        [[]],
        [{}],
    ),
)
TOKENS = [json.dumps(key).encode() for key in KEYS] + [json.dumps(value).encode() for value in VALUES]
TOKENS += [b'{"', b'"}', b"[", b"]", b"{", b"}", b",", b":", b"NaN", b"-", b"1e999", b"\\u", b"\xff", b"\xef\xbb\xbf"]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def check_network(data: bytes) -> str:
    """The property: BadConfig with a bounded sentence, or a network that every later step can work with."""
    answers = [_answer(parse_list, data), _answer(parse_single, data)]
    return " | ".join(answers)


def _answer(parse: Any, data: bytes) -> str:
    try:
        network = parse(data, source="/etc/cni/net.d/x")
    except BadConfig as refusal:
        sentence = str(refusal)
        assert sentence.endswith((".", "'")), sentence
        assert len(sentence) < 700
        return re.sub(r"'[^']*'|\d+", "", sentence)[:60]
    _use(network)
    return f"{len(network.plugins)} {sorted(network.capabilities)[:2]} {network.disable_check} {network.cni_version}"


def _use(network: NetworkConfig) -> None:
    """Do with a network what the provider does with it."""
    plan = AttachmentPlan(
        container_id="a" * 64,
        interface="eth0",
        netns_path="/run/netns/x",
        network=network,
        arguments=(("IgnoreUnknown", "1"),),
        capabilities={name: {} for name in network.capabilities},
        bin_dirs=("/usr/lib/cni",),
    )
    stored = plan.to_network_plan()
    content = json.loads(json.dumps(stored.content, ensure_ascii=False).encode())
    assert (
        AttachmentPlan.from_network_plan(NetworkPlan(plugin="cni", netns_path="/run/netns/x", content=content)) == plan
    )
    for name in network.executables:
        assert NAME.fullmatch(name), name
        assert name not in {".", ".."}
    for plugin in network.plugins:
        request = json.loads(make_input(network, plugin, capabilities=plan.capabilities, previous={"ips": []}))
        assert request["name"] == network.name
        assert request["cniVersion"] == network.cni_version
        assert set(request.get("runtimeConfig", {})) <= network.capabilities
        assert {
            key: request[key] for key in plugin if key not in {"name", "cniVersion", "prevResult", "runtimeConfig"}
        } == {key: plugin[key] for key in plugin if key not in {"name", "cniVersion", "prevResult", "runtimeConfig"}}
        json.loads(make_gc_input(network, plugin, [("a", "eth0")]))
    assert "\0" not in "".join(make_environment("ADD", bin_dirs=(), plan=plan).values())


def generate(chance: random.Random) -> bytes:
    """A configuration that is nearly right."""
    plugin: dict[str, Any] = {"type": chance.choice(["bridge", "ptp", *VALUES])}
    top: dict[str, Any] = {"name": "net", "cniVersion": "1.0.0", "plugins": [plugin]}
    for place in (plugin, top):
        for _ in range(chance.randrange(3)):
            place[chance.choice(KEYS)] = _value(chance, 2)
    return json.dumps({**top, **(plugin if chance.random() < 0.3 else {})}).encode()


def _value(chance: random.Random, depth: int) -> Any:
    kind = chance.randrange(4) if depth else 0
    if kind == 1:
        return {chance.choice(KEYS): _value(chance, depth - 1) for _ in range(chance.randrange(3))}
    if kind == 2:
        return [_value(chance, depth - 1) for _ in range(chance.randrange(3))]
    return chance.choice(VALUES)


def make_fuzzer(**changes: Any) -> Fuzzer:
    """The fuzzer of network configurations."""
    return Fuzzer(check=check_network, corpus="conflist", tokens=TOKENS, generate=generate, **changes)


def test_configurations_are_refused_or_usable() -> None:
    """Nothing but BadConfig is ever raised, and what passes can be stored, read back and handed to plugins."""
    print(make_fuzzer().run())


def _plugin_without_type_checks(item: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("type"), str):
        raise BadConfig(f"In {where}: no.")
    return item


def _executable_without_form(name: Any, what: str) -> None:
    if not isinstance(name, str):
        raise BadConfig(f"{what} no.")


@pytest.mark.parametrize(
    ("name", "replacement"),
    [("_plugin", _plugin_without_type_checks), ("_require_executable", _executable_without_form)],
)
def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any) -> None:
    """A reader that forgets to look at a type, or at the form of a plugin's name, is caught within seconds."""
    monkeypatch.setattr(conflist, name, replacement)
    finds(make_fuzzer(seconds=20, seed=1), name)
