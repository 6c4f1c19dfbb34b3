"""Plugins are found, loaded alone, and reported; what one of them does wrong is its own matter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dispatcher.api import ImageDisk, ImageProvider, NetworkProvider, Sizer, StreamingProvider
from dispatcher.config import parse_config
from dispatcher.errors import NetworkNotReady, NoRuntime, NotSupported, RuntimeDown
from dispatcher.model import ImageId, PodMetadata, PodSpec, make_pod_id
from dispatcher.registry import Registry
from dispatcher.registry.registry import check_sections
from dispatcher.testing import FakeImages
from dispatcher.testing.plugin import plugin as fake
from tests.unit.registry.conftest import Install, Load

POD = PodSpec(metadata=PodMetadata(name="p", namespace="n", uid="u"))


def failures(registry: Registry) -> dict[str, str]:
    return {report["name"]: report["error"] for report in registry.report() if report["error"]}


# --------------------------------------------------------------------------------------------------------- which and what
def test_an_enabled_plugin_is_loaded_and_reported(load: Load) -> None:
    registry = load("plugins: {enabled: [fake]}")
    report = registry.report()[0]
    assert (report["name"], report["state"], report["version"]) == ("fake", "active", "1.0")
    assert report["distribution"] == "cri-dispatcher-fakes"
    assert report["offers"]["runtime"] == ["fake"]
    assert sorted(report["active"]) == ["images fake", "network fake", "runtime fake", "sizer fake", "streaming fake"]
    assert "CanExec" in report["abilities"]["fake"]
    assert registry.extra_conditions() == ()
    assert [runtime.name for runtime in registry.runtimes()] == ["fake"]


def test_nothing_is_imported_that_is_not_enabled(load: Load, install: Install) -> None:
    """A pip install alone is never root code."""
    module = install("sleeper", "raise SystemExit('imported')")
    registry = load("plugins: {enabled: [fake]}")
    assert module not in sys.modules
    assert [report["name"] for report in registry.report()] == ["fake"]


# ruff: noqa: ISC004 - source text in pieces reads better without more parentheses
BROKEN = {
    "import error": ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
    "assertion": ("assert False, 'planted'", "planted"),
    "exit": ("raise SystemExit(3)", "SystemExit"),
    "no such object": ("x = 1", "plugin"),
    "no api": ("class plugin: name = 'broken'", "no API"),
    "odd api": ("class plugin: API = '1.0'; name = 'broken'", "no API"),
    "older major": ("class plugin: API = (0, 9); name = 'broken'", "interface 0.9, and this is 1.0"),
    "newer major": ("class plugin: API = (2, 0); name = 'broken'", "interface 2.0, and this is 1.0"),
    "newer minor": ("class plugin: API = (1, 99); name = 'broken'", "interface 1.99, and this is 1.0"),
    "another name": ("class plugin: API = (1, 0); name = 'x'", "calls itself 'x'"),
    "register raises": (
        "class plugin:\n API = (1, 0); name = 'broken'\n def register(r): raise OSError('planted')",
        "OSError: planted",
    ),
    "register is async": (
        "class plugin:\n API = (1, 0); name = 'broken'\n async def register(r): pass",
        "must not be async",
    ),
    "offers nonsense": (
        "class plugin:\n API = (1, 0); name = 'broken'\n def register(r): r.runtime('x', None)",
        "needs a name and a factory",
    ),
    "offers twice": (
        "class plugin:\n API = (1, 0); name = 'broken'\n def register(r): r.sizer('x', print); r.sizer('x', print)",
        'offers sizer "x" twice',
    ),
    "factory raises": (
        "def f(section, services): raise ValueError('bad section')\n"
        "class plugin:\n API = (1, 0); name = 'broken'\n def register(r): r.runtime('x', f)",
        'runtime "x": ValueError: bad section',
    ),
    "factory gives none": (
        "class plugin:\n API = (1, 0); name = 'broken'\n def register(r): r.runtime('x', lambda s, v: None)",
        "lacks start, aclose, probe",
    ),
    "properties are nonsense": (
        "from dispatcher.testing import make_runtime\n"
        "def f(section, services):\n r = make_runtime(name='x'); r.option_keys = ['a']; return r\n"
        "class plugin:\n API = (1, 0); name = 'broken'\n def register(r): r.runtime('x', f)",
        "option_keys is list instead of frozenset",
    ),
    "object has another name": (
        "from dispatcher.testing import make_runtime\n"
        "class plugin:\n API = (1, 0); name = 'broken'\n"
        " def register(r): r.runtime('x', lambda s, v: make_runtime(name='y'))",
        "calls itself 'y'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_go_on(load: Load, install: Install, kind: str) -> None:
    source, words = BROKEN[kind]
    install("broken", source)
    registry = load("plugins: {enabled: [broken, fake]}")
    assert words in failures(registry)["broken"]
    assert [runtime.name for runtime in registry.runtimes()] == ["fake"]
    (condition,) = registry.extra_conditions()
    assert (condition[0], condition[1]) == ("Plugin/broken", False)
    assert words in condition[3]


def test_a_plugin_that_is_not_installed_is_reported(load: Load) -> None:
    registry = load("plugins: {enabled: [fake, ghost]}")
    assert "no installed distribution" in failures(registry)["ghost"]


def test_two_distributions_with_one_name_are_refused(load: Load, install: Install) -> None:
    """Which one would be loaded depends on the order of installation: neither."""
    source = "from dispatcher.testing import FakePlugin\nplugin = FakePlugin('twin')"
    install("twin", source, distribution="first")
    install("twin", source, distribution="second")
    registry = load("plugins: {enabled: [twin]}")
    assert "several distributions have a plugin of this name: first, second" in failures(registry)["twin"]


def test_two_plugins_that_offer_one_name_are_refused(load: Load, install: Install) -> None:
    install(
        "thief",
        """
        from dispatcher.testing import make_runtime
        class plugin:
            API = (1, 0)
            name = "thief"
            def register(registrar):
                registrar.runtime("fake", lambda section, services: make_runtime(name="fake"))
                registrar.runtime("own", lambda section, services: make_runtime(name="own"))
        """,
    )
    registry = load("plugins: {enabled: [fake, thief]}")
    assert set(failures(registry)) == {"fake", "thief"}
    assert [runtime.name for runtime in registry.runtimes()] == ["own"]
    with pytest.raises(NoRuntime, match="disable one of them"):
        registry.runtime("fake")


# ------------------------------------------------------------------------------------------------------------- providers
@pytest.mark.parametrize("kind", ["network", "images", "sizer", "streaming"])
def test_a_provider_is_swapped_by_one_line(load: Load, kind: str) -> None:
    """Two plugins offer everything; one line of dispatcher.yaml decides, for each kind by itself."""
    base = {"network": "fake", "images": "fake", "sizer": "fake", "streaming": "fake"}
    for wanted in ("fake", "other"):
        chosen = base | {kind: wanted}
        lines = "".join(f"  {key}: {value}\n" for key, value in chosen.items())
        registry = load(f"plugins: {{enabled: [fake, other]}}\nproviders:\n{lines}")
        active: dict[str, NetworkProvider | ImageProvider | Sizer | StreamingProvider | None] = {
            "network": registry.network,
            "images": registry.images,
            "sizer": registry.sizer,
            "streaming": registry.streaming,
        }
        names = {key: provider.name if provider is not None else "" for key, provider in active.items()}
        assert names == chosen
        assert {runtime.name for runtime in registry.runtimes()} == {"fake", "other"}


async def test_the_chosen_providers_do_the_work(load: Load) -> None:
    registry = load(
        "plugins: {enabled: [fake, other]}\nproviders: {network: other, images: fake, sizer: other, streaming: fake}"
    )
    await registry.start(lambda: ())
    plan = registry.network.plan(make_pod_id(), POD, "/run/netns/x")
    assert plan.plugin == "other"
    assert (await registry.network.add(plan)).ips == ("10.99.0.1",)
    image = await registry.images.pull("busybox", None)
    assert registry.images.find("busybox") == image
    assert registry.sizer is not None
    assert registry.sizer.size(POD).vcpus == 1
    await registry.aclose()


def test_runtimes_are_given_the_chosen_images_and_sizer(load: Load, install: Install) -> None:
    install(
        "curious",
        """
        from dispatcher.testing import make_runtime
        seen = []
        def factory(section, services):
            seen.append((section, services))
            return make_runtime(name="curious")
        class plugin:
            API = (1, 0)
            name = "curious"
            def register(registrar):
                registrar.runtime("curious", factory)
        """,
    )
    registry = load(
        "plugins: {enabled: [curious, fake, other], curious: {a: 1}}\n"
        "providers: {network: fake, images: other, sizer: fake, streaming: fake}"
    )
    assert failures(registry) == {}
    module = next(found for name, found in sys.modules.items() if name.startswith("plugin_curious"))
    section, services = module.seen[0]
    assert section == {"a": 1}
    assert (services.images.name, services.sizer.name, services.node_uuid) == ("other", "fake", "n")
    assert services.state_dir.name == "curious"
    assert oct(services.state_dir.stat().st_mode & 0o777) == "0o700"
    services.notify("Odd", "something for operators")
    assert ("Notice/curious", False, "Odd", "something for operators") in registry.extra_conditions()
    assert next(r for r in registry.report() if r["name"] == "curious")["message"] == "something for operators"
    services.notify("", "")
    assert registry.extra_conditions() == ()


def test_several_offers_need_a_choice_and_a_wrong_choice_gets_a_hint(load: Load) -> None:
    registry = load("plugins: {enabled: [fake, other]}\nproviders: {images: fake, network: othr}")
    reasons = {name: text for name, _, _, text in registry.extra_conditions()}
    assert "names 'othr', which no loaded plugin offers. Did you mean \"other\"?" in reasons["Notice/providers.network"]
    assert registry.network.status().ready is False
    registry = load("plugins: {enabled: [fake, other]}")
    assert (
        "choose one as providers.images" in {c[0]: c[3] for c in registry.extra_conditions()}["Notice/providers.images"]
    )


async def test_without_providers_the_node_answers_and_says_why(load: Load) -> None:
    """A broken plugin makes the node not ready; it does not keep the daemon from starting."""
    registry = load("plugins: {enabled: [ghost]}")
    await registry.start(lambda: ())
    status = registry.network.status()
    assert (status.ready, status.reason) == (False, "NoNetworkProvider")
    assert "ghost" in status.message
    with pytest.raises(NetworkNotReady):
        registry.network.plan(make_pod_id(), POD, "/x")
    assert registry.images.list() == ()
    assert await registry.images.disk() == ImageDisk(image_filesystems=(), container_filesystems=())
    with pytest.raises(RuntimeDown, match=r"No loaded plugin offers an image provider\..*ghost"):
        await registry.images.pull("busybox", None)
    with pytest.raises(NotSupported):
        registry.streaming.port_forward_url(make_pod_id(), ())
    assert registry.sizer is None
    with pytest.raises(NoRuntime):
        registry.runtime("docker")
    await registry.aclose()


def test_a_runtime_of_a_failed_plugin_is_refused_with_the_reason(load: Load, install: Install) -> None:
    install(
        "docker",
        "def f(section, services): raise ValueError('socket is no path')\n"
        "class plugin:\n API = (1, 0); name = 'docker'\n def register(r): r.runtime('docker', f)",
    )
    registry = load("plugins: {enabled: [docker, fake]}")
    with pytest.raises(NoRuntime, match=r"not loaded\. Its plugin docker failed: .*socket is no path"):
        registry.runtime("docker")


# ------------------------------------------------------------------------------------------------------ section checks
def test_sections_are_checked_by_their_plugins_with_positions(load: Load, install: Install, tmp_path: Path) -> None:
    install(
        "strict",
        """
        from pydantic import BaseModel, ConfigDict
        class Inner(BaseModel):
            model_config = ConfigDict(extra="forbid")
            size: int = 1
        class Model(BaseModel):
            model_config = ConfigDict(extra="forbid")
            inner: Inner = Inner()
            names: tuple[str, ...] = ()
        class plugin:
            API = (1, 0)
            name = "strict"
            def register(registrar):
                registrar.check_section(Model.model_validate)
        """,
    )
    load("")
    text = (
        "plugins:\n"
        "  enabled: [strict, fake, ghost]\n"
        "  strict:\n"
        "    inner: {size: big, sice: 3}\n"
        "    names: [a, [b]]\n"
        "  fake: {abilitys: []}\n"
    )
    found = [str(problem) for problem in check_sections(parse_config(text, "d.yaml"))]
    assert len(found) == 5
    assert found[0].startswith("d.yaml:4:19: plugins.strict.inner.size: ")
    assert found[1] == "d.yaml:4:24: plugins.strict.inner.sice: unknown key."
    assert found[2].startswith("d.yaml:5:16: plugins.strict.names[1]: ")
    assert found[3].startswith("d.yaml:6:9: plugins.fake: unknown key 'abilitys'")
    assert found[4].startswith("d.yaml:2:12: plugins.enabled: ghost: no installed distribution")
    assert check_sections(parse_config("plugins: {enabled: [fake], fake: {isolation: vm}}", "d")) == []


async def test_leases_are_passed_on(load: Load) -> None:
    """What records imply reaches the image provider when it starts."""
    registry = load("plugins: {enabled: [fake]}")
    await registry.start(lambda: (("container", ImageId("sha256:x")),))
    images: FakeImages = fake.newest(FakeImages)
    assert images.leases == {"container": {"sha256:x"}}
    await registry.aclose()
