"""`run`: from options to the manifest that they stand for, and what is refused."""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from dispatcher.commands import cli
from dispatcher.commands.output import Failure
from dispatcher.commands.run import default_name, make_document, parse_port, parse_volume
from dispatcher.commands.sessions import _read_auth
from dispatcher.manifest import Node, Placement, PodManifest, container_config, read_manifest, run_request


def parse(*words: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(["run", *words])


def manifest(*words: str) -> PodManifest:
    (pod,) = read_manifest(json.dumps(make_document(parse(*words))), "command line")
    return pod


def config(pod: PodManifest) -> Any:
    placement = Placement(uid="u", pod_dir="/pods/u")
    return container_config(pod, pod.spec.containers[0], placement, Node())


def test_command_words_arrive_as_they_were_typed() -> None:
    words = ["sh", "-c", "echo $HOME $(NAME) $$ ${X} -rm", "--", "-x"]
    built = config(manifest("--env", "NAME=value $(NAME) $$", "busybox", *words))
    assert list(built.args) == words
    assert list(built.command) == []
    assert {env.key: env.value for env in built.envs} == {"NAME": b"value $(NAME) $$"}


def test_entrypoint_replaces_the_program() -> None:
    built = config(manifest("--entrypoint", "/bin/sh", "busybox", "-c", "true"))
    assert (list(built.command), list(built.args)) == (["/bin/sh"], ["-c", "true"])


def test_options_reach_the_pod() -> None:
    pod = manifest(
        *("--name", "web", "--namespace", "prod", "--memory", "64Mi", "--cpus", "0.5", "--user", "10:20", "-w", "/w"),
        *("-v", "/srv:/data:ro", "-p", "8080:80/udp", "--label", "a=b=c", "--annotation", "x=", "--read-only", "nginx"),
    )
    request = run_request(pod, Placement(uid="u", pod_dir="/pods/u"), Node())
    assert (request.config.metadata.name, request.config.metadata.namespace) == ("web", "prod")
    assert request.config.labels["a"] == "b=c"
    assert request.config.annotations["x"] == ""
    (port,) = request.config.port_mappings
    assert (port.host_port, port.container_port, port.protocol) == (8080, 80, 1)
    built = config(pod)
    assert built.linux.resources.memory_limit_in_bytes == 64 << 20
    assert built.linux.resources.cpu_quota == 50_000
    assert built.linux.security_context.run_as_user.value == 10
    assert built.linux.security_context.run_as_group.value == 20
    assert built.linux.security_context.readonly_rootfs
    assert built.working_dir == "/w"
    mount = next(mount for mount in built.mounts if mount.container_path == "/data")
    assert (mount.host_path, mount.readonly) == ("/srv", True)


def test_privilege_and_host_network_are_told_to_the_policy_at_once() -> None:
    request = run_request(
        manifest("--privileged", "--host-network", "x"), Placement(uid="u", pod_dir="/pods/u"), Node()
    )
    assert request.config.linux.security_context.privileged
    assert request.config.linux.security_context.namespace_options.network == 2


@pytest.mark.parametrize("image", ["busybox", "r.example:5000/a/B_b:1.2@sha256:00", "-", "x" * 300, "r/---:t"])
def test_default_names_are_names(image: str) -> None:
    name = default_name(image)
    assert name != default_name(image)
    read_manifest(json.dumps({**make_document(parse("--name", name, "x"))}), "f")


@pytest.mark.parametrize("text", ["a:/b", "/a", "/a:b", "/a:/b:rx", ""])
def test_bad_volumes(text: str) -> None:
    with pytest.raises(Failure, match="HOST:PATH"):
        parse_volume(text)


@pytest.mark.parametrize("text", ["80", "a:80", "1:2/icmp", "1:2:3", "٣:80"])
def test_bad_ports(text: str) -> None:
    with pytest.raises(Failure, match="HOST:PORT"):
        parse_port(text)


@pytest.mark.parametrize(
    "words", [["--env", "X"], ["--env", "=1"], ["--label", "x"], ["--user", "root"], ["-u", "1:a"]]
)
def test_bad_pairs_and_numbers(words: list[str]) -> None:
    with pytest.raises(Failure) as failure:
        make_document(parse(*words, "image"))
    assert failure.value.code == 2


def test_credentials_are_found_by_registry(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    auth = base64.b64encode(b"u:p:w").decode()
    file.write_text(json.dumps({"auths": {"https://index.docker.io/v1/": {"auth": auth}, "r:5000": {"auth": auth}}}))
    find = _read_auth(str(file))
    assert find("busybox")["password"] == "p:w"
    assert find("library/busybox")["username"] == "u"
    assert find("r:5000/x")["server_address"] == "r:5000"
    assert find("other.example/x") is None


@pytest.mark.parametrize(
    "text", ["", "{}", '{"auths": {"r": {}}}', '{"auths": {"r": {"auth": "%%%"}}}', '{"auths": 1}']
)
def test_a_broken_credentials_file_is_refused_without_its_contents(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(Failure, match="cannot be read as a docker config file"):
        _read_auth(str(file))
