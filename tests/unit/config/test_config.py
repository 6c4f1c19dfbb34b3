"""dispatcher.yaml: everything has a default, everything wrong is named, plugins own their sections."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.config import OWN_PLUGINS, Config, load_config, parse_config
from dispatcher.yaml_marks import YamlError


def refused(text: str) -> list[str]:
    with pytest.raises(YamlError) as caught:
        parse_config(text, "d.yaml")
    return str(caught.value).split("\n")


def test_an_empty_file_is_a_whole_configuration() -> None:
    config = parse_config("", "d.yaml").config
    assert config == Config()
    assert config.plugins.enabled == OWN_PLUGINS
    assert config.socket.mode_bits == 0o600
    assert config.state_dir == Path("/var/lib/dispatcher")
    assert (config.metrics.host, config.metrics.port) == ("127.0.0.1", 9477)
    assert config.required_runtimes is None


def test_every_value_arrives() -> None:
    config = parse_config(
        """
socket: {path: /tmp/x.sock, mode: 0660}
state_dir: /a
run_dir: /b
policy: /c/policy.yaml
plugins:
  enabled: [docker_shim, third_party]
  docker_shim: {socket: /var/run/other.sock}
  third_party:
providers: {network: cni, images: oci}
required_runtimes: [docker]
cgroup_driver: systemd
deadlines: {runtime: {create_pod: 5, probe: 0.5}, network: {add: 7}}
health: {probe_interval_s: 1, required_grace_s: 0}
hooks: {time_limit_s: 0.1, failures_before_disabled: 9}
abandoned_call_s: 60
metrics: {listen: "[::1]:0"}
logging: {level: debug, format: json}
""",
        "d.yaml",
    ).config
    assert (str(config.socket.path), config.socket.mode_bits) == ("/tmp/x.sock", 0o660)
    assert config.plugins.section("docker_shim") == {"socket": "/var/run/other.sock"}
    assert config.plugins.section("third_party") == {}
    assert config.plugins.section("cni") == {}
    assert (config.providers.network, config.providers.sizer) == ("cni", None)
    assert (config.deadlines.runtime.create_pod, config.deadlines.runtime.stop_pod) == (5.0, 60.0)
    assert config.deadlines.network.add == 7.0
    assert config.required_runtimes == ("docker",)
    assert (config.metrics.host, config.metrics.port) == ("::1", 0)


def test_everything_wrong_is_named_at_once() -> None:
    assert refused(
        "sate_dir: /x\n"
        "socket: {mod: 1, mode: 600}\n"
        "run_dir: relative\n"
        "policy: /a/../b\n"
        "deadlines: {runtime: {crate_pod: 1, probe: 0}}\n"
        "metrics: {listen: 0.0.0.0:80}\n"
        "logging: {level: inof}\n"
        "required_runtimes: docker\n"
    ) == [
        'd.yaml:1:1: sate_dir: unknown key. Did you mean "state_dir"?',
        'd.yaml:2:10: socket.mod: unknown key. Did you mean "mode"?',
        "d.yaml:2:24: socket.mode: should be a valid string, not 600",
        "d.yaml:3:10: run_dir: must be an absolute path without ..",
        "d.yaml:4:9: policy: must be an absolute path without ..",
        'd.yaml:5:23: deadlines.runtime.crate_pod: unknown key. Did you mean "create_pod"?',
        "d.yaml:5:44: deadlines.runtime.probe: should be greater than 0, not 0",
        "d.yaml:6:19: metrics.listen: must be a loopback address and a port, such as 127.0.0.1:9477",
        "d.yaml:7:18: logging.level: 'inof' is not one of debug, info, warning, error. Did you mean \"info\"?",
        "d.yaml:8:20: required_runtimes: should be a valid array, not 'docker'",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "plugins: {dokcer_shim: {}}",
            "d.yaml:1:11: plugins.dokcer_shim: there is no enabled plugin of this name. Did",
        ),
        ("plugins: {cni: 5}", "d.yaml:1:16: plugins.cni: should be a mapping"),
        ("plugins: {enabled: [cni, cni]}", "d.yaml:1:20: plugins.enabled: cni stands there more than once"),
        ("plugins: {enabled: ['../x']}", "d.yaml:1:21: plugins.enabled[0]: "),
        ("state_dir: /a\nrun_dir: /a", "d.yaml:1:1: state_dir and run_dir must differ"),
        ("socket: {path: /" + "x" * 120 + "}", "d.yaml:1:16: socket.path: is longer than the 107 bytes"),
        ("metrics: {listen: localhost:1}", "d.yaml:1:19: metrics.listen: must be a loopback address"),
        ("metrics: {listen: 127.0.0.1:99999}", "d.yaml:1:19: metrics.listen: must be a loopback address"),
        ("[]", "d.yaml:1:1: "),
        ("state_dir: /a\x00b", "d.yaml:1:"),
    ],
)
def test_slips_of_the_pen_are_found(text: str, line: str) -> None:
    assert refused(text)[0].startswith(line)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(YamlError, match=r"missing\.yaml:1:1: cannot be read: No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(YamlError, match="Is a directory"):
        load_config(tmp_path)


def test_an_open_socket_is_not_the_default() -> None:
    """Whoever reaches the socket is root on the node: only an explicit mode opens it."""
    assert Config().socket.mode_bits & 0o077 == 0
