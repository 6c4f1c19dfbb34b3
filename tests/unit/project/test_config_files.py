"""The files below config/ load, say what the code does, and fit each other."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from dispatcher.config import OWN_PLUGINS, Config, LoadedConfig, load_config
from dispatcher_cni.config import CniConfig, DefaultNetwork
from dispatcher_cni.conflist import parse_list
from dispatcher_cni.default_network import make_default_network
from dispatcher_docker_shim import config as docker_config
from dispatcher_hyper_vm import config as vm_config
from dispatcher_images.config import ImagesConfig
from dispatcher_streaming.config import StreamingConfig
from dispatcher_vm_sizing.config import SizingConfig

CONFIG = Path(__file__).parents[3] / "config"

# Whose default depends on the machine, so that the file shows it as a comment.
SHOWN_AS_COMMENT = {"platforms"}


@pytest.fixture(scope="module")
def loaded() -> LoadedConfig:
    """The shipped dispatcher.yaml."""
    return load_config(CONFIG / "dispatcher.yaml")


def missing_keys(model: type[BaseModel], value: dict[str, Any], where: str = "") -> list[str]:
    """Return the schema's keys that a document leaves out, at any depth."""
    missing = []
    for name, field in model.model_fields.items():
        path = f"{where}{field.alias or name}"
        if name in SHOWN_AS_COMMENT:
            continue
        if name not in value:
            missing.append(path)
        elif isinstance(value[name], dict):
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                missing += missing_keys(kind, value[name], path + ".")
    return missing


def test_dispatcher_yaml_shows_every_default(loaded: LoadedConfig) -> None:
    """The file is the reference of all keys: each is there, and each has the value it has when left out."""
    text = (CONFIG / "dispatcher.yaml").read_text()
    assert missing_keys(Config, yaml.safe_load(text)) == []
    defaults = Config()
    for name in Config.model_fields:
        if name != "plugins":
            assert getattr(loaded.config, name) == getattr(defaults, name), name
    assert loaded.config.plugins.enabled == OWN_PLUGINS
    assert all(f"# {name}:" in text for name in SHOWN_AS_COMMENT)


def test_plugin_sections_show_every_default(loaded: LoadedConfig) -> None:
    """The same for the sections of our plugins, checked by the plugins' own schemas."""
    plugins = loaded.config.plugins
    assert CniConfig.from_section(plugins.section("cni")) == CniConfig()
    assert docker_config.parse(plugins.section("docker_shim")) == docker_config.Config()
    assert vm_config.parse(plugins.section("hyper_vm")) == vm_config.Config()
    assert ImagesConfig.model_validate(dict(plugins.section("images"))) == ImagesConfig()
    assert StreamingConfig.model_validate(dict(plugins.section("streaming"))) == StreamingConfig()
    assert SizingConfig.from_section(plugins.section("vm_sizing")) == SizingConfig()
    models: tuple[tuple[str, type[BaseModel]], ...] = (
        ("cni", CniConfig),
        ("docker_shim", docker_config.Config),
        ("hyper_vm", vm_config.Config),
        ("images", ImagesConfig),
        ("streaming", StreamingConfig),
        ("vm_sizing", SizingConfig),
    )
    for name, model in models:
        assert missing_keys(model, dict(plugins.section(name)), f"plugins.{name}.") == []


def test_bridge_network_is_the_built_in_one() -> None:
    """The shipped conflist loads, and is the network that `default_network.allow` would make."""
    shipped = parse_list((CONFIG / "10-dispatcher-bridge.conflist").read_bytes())
    built_in = make_default_network(DefaultNetwork())
    assert (shipped.name, shipped.cni_version) == (built_in.name, built_in.cni_version)
    assert json.dumps(shipped.plugins, sort_keys=True) == json.dumps(built_in.plugins, sort_keys=True)


def read_unit() -> configparser.ConfigParser:
    """The systemd unit, read as an INI file, which it is as long as no key repeats."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(CONFIG / "dispatcher.service")
    return unit


def test_unit_leaves_pods_alone(loaded: LoadedConfig) -> None:
    """Stopping the unit ends the daemon only; cgroups are delegated; readiness is told; folders are the configured ones."""
    service = read_unit()["Service"]
    assert service["KillMode"] == "process"
    assert service["Delegate"] == "yes"
    assert service["Type"] == "notify"
    assert service["TimeoutStartSec"] == "infinity"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert Path("/run") / service["RuntimeDirectory"] == loaded.config.run_dir
    assert Path("/var/lib") / service["StateDirectory"] == loaded.config.state_dir
    assert Path("/etc") / service["ConfigurationDirectory"] == loaded.config.policy.parent
    namespaced = (
        "Private",
        "Protect",
        "ReadOnlyPaths",
        "ReadWritePaths",
        "InaccessiblePaths",
        "BindPaths",
        "TemporaryFile",
    )
    assert [key for key in service if key.startswith(namespaced)] == []


def test_unit_is_valid_for_systemd(tmp_path: Path) -> None:
    """Where systemd is installed, it finds no fault with the unit (but for the program, which is not there)."""
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "dispatcher.service"
    text = (CONFIG / "dispatcher.service").read_text()
    unit.write_text(text.replace("/opt/cri-dispatcher/bin/dispatcher", "/bin/true"))
    done = subprocess.run([verify, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
    assert complaints == []


def test_kubelet_snippet_names_our_socket(loaded: LoadedConfig) -> None:
    """The kubelet is pointed to the configured socket, for images too."""
    snippet = yaml.safe_load((CONFIG / "kubelet.yaml").read_text())
    assert (snippet["apiVersion"], snippet["kind"]) == ("kubelet.config.k8s.io/v1beta1", "KubeletConfiguration")
    assert snippet["containerRuntimeEndpoint"] == f"unix://{loaded.config.socket.path}"
    assert snippet["imageServiceEndpoint"] == snippet["containerRuntimeEndpoint"]
    slowest_s = loaded.config.deadlines.runtime.create_container
    assert int(snippet["runtimeRequestTimeout"].removesuffix("m")) * 60 >= slowest_s
