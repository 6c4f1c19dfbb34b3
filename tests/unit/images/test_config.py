"""The plugin's section: defaults work, mistakes are named, mirrors and schemes follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dispatcher_images.config import ImagesConfig, is_loopback
from dispatcher_images.endpoints import Endpoint, Endpoints
from dispatcher_images.plugin import plugin
from dispatcher_images.reference import parse
from dispatcher_images.registry_client import EndpointFailed, RegistryClient


def urls(section: Mapping[str, object], text: str) -> list[str]:
    endpoints = Endpoints(ImagesConfig.model_validate(section)).of(parse(text))
    return [f"{item.url}/{item.repository}" + (" trusted" if item.is_trusted else "") for item in endpoints]


def test_an_empty_section_is_enough() -> None:
    config = ImagesConfig.model_validate({})
    assert config.platforms[0].startswith("linux/")
    assert config.limits().max_bytes > 0


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"mirors": {}}, "mirors"),
        ({"workers": "two"}, "workers"),
        ({"workers": 0}, "workers"),
        ({"folder": "relative"}, "folder"),
        ({"plain_http": ["http://x"]}, "http://x"),
        ({"platforms": []}, "platform"),
        ({"platforms": ["amd64"]}, "platform"),
        ({"mirrors": {"docker.io": ["ftp://x"]}}, "ftp://x"),
        ({"mirrors": {"docker.io": ["http://user@x"]}}, "user@x"),
        ({"mirrors": {"docker.io": {"mirror": []}}}, "mirror"),
        ({"mirrors": {"a b": []}}, "a b"),
        ({"erofs_compression": "zip"}, "erofs_compression"),
        ({"max_erofs_bytes": -1}, "max_erofs_bytes"),
    ],
)
def test_a_mistake_is_refused_and_named(section: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        ImagesConfig.model_validate(section)


def test_a_registry_is_asked_over_tls_unless_it_is_this_node() -> None:
    assert urls({}, "r.io/a:1") == ["https://r.io/a trusted"]
    assert urls({}, "busybox") == ["https://registry-1.docker.io/library/busybox trusted"]
    assert urls({}, "127.0.0.1:5000/a") == ["http://127.0.0.1:5000/a trusted"]
    assert urls({"plain_http_loopback": False}, "127.0.0.1:5000/a") == ["https://127.0.0.1:5000/a trusted"]
    assert urls({"plain_http": ["lab:5000"]}, "lab:5000/a") == ["http://lab:5000/a trusted"]


def test_a_certificate_folder_means_tls_on_loopback_too(tmp_path: Path) -> None:
    (tmp_path / "127.0.0.1:5000").mkdir()
    (tmp_path / "127.0.0.1:5000" / "ca.crt").write_text("x")
    assert urls({"certs_dir": str(tmp_path)}, "127.0.0.1:5000/a") == ["https://127.0.0.1:5000/a trusted"]


def test_mirrors_are_asked_first_without_credentials_and_then_the_registry() -> None:
    section = {"mirrors": {"registry.k8s.io": ["http://127.0.0.1:5000"]}}
    assert urls(section, "registry.k8s.io/e2e/busybox:1") == [
        "http://127.0.0.1:5000/e2e/busybox",
        "https://registry.k8s.io/e2e/busybox trusted",
    ]


def test_the_longest_prefix_counts_and_is_replaced_by_the_mirrors_path() -> None:
    section = {
        "mirrors": {
            "gcr.io": ["http://127.0.0.1:5000"],
            "gcr.io/k8s-staging": {
                "mirrors": [{"url": "http://127.0.0.1:5000/cri", "send_credentials": True}, "https://m.io"],
                "origin": False,
            },
        }
    }
    assert urls(section, "gcr.io/k8s-staging/x:1") == ["http://127.0.0.1:5000/cri/x trusted", "https://m.io/x"]
    assert urls(section, "gcr.io/k8s-staging-2/x:1")[0] == "http://127.0.0.1:5000/k8s-staging-2/x"


def test_loopback_is_what_the_kernel_says_not_what_a_name_looks_like() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1:5000", "127.9.9.9", "localhost:1", "[::1]:5000"))
    assert not any(is_loopback(host) for host in ("127.0.0.1.evil.io", "localhost.evil.io", "10.0.0.1", "0177.0.0.1"))


def test_a_registry_elsewhere_may_not_send_us_to_this_node() -> None:
    client = RegistryClient(ImagesConfig())
    endpoint = Endpoint(url="https://r.example", repository="a", is_trusted=True)
    remote = client.remote(parse("r.example/a:1"), None)
    for target in ("https://127.0.0.1/x", "https://localhost:9/x", "https://[::1]/x"):
        with pytest.raises(EndpointFailed, match="this node"):
            remote._redirected(endpoint, endpoint.url, target)
    assert remote._redirected(endpoint, "https://r.example/v2/a", "/b?c") == "https://r.example/b?c"


def test_the_examples_of_the_documentation_are_valid() -> None:
    page = (Path(__file__).parents[3] / "docs/images.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    ImagesConfig.model_validate(yaml.safe_load(example)["plugins"]["images"])


def test_the_plugin_offers_its_provider_and_checks_its_section() -> None:
    offered: dict[str, Any] = {}

    class Registrar:
        def images(self, name: str, factory: Any) -> None:
            offered[name] = factory

        def check_section(self, check: Any) -> None:
            offered["check"] = check

    plugin.register(Registrar())  # type: ignore[arg-type]
    assert set(offered) == {"oci", "check"}
    offered["check"]({"workers": 1})
    with pytest.raises(ValueError, match="workerz"):
        offered["check"]({"workerz": 1})
