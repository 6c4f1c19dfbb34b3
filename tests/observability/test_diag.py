"""`dispatcher diag dump` on a real node: everything that a support case needs, and none of the planted secrets."""

from __future__ import annotations

import base64
import json
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from dispatcher.cri import api_pb2 as pb
from tests.lab.client import refused
from tests.lab.images import BUSYBOX, TestImages
from tests.lab.node import Node

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


PLANTED = {
    name: f"Pl4nted-{name}-{number:04d}x"
    for number, name in enumerate(
        (
            "variable",
            "odd_variable",
            "json_variable",
            "annotation",
            "nested",
            "base64",
            "label",
            "registry",
            "argument",
            "policy",
            "cni",
            "cni_environment",
            "log",
            "identity",
        ),
        start=7311,
    )
}


def forms(secret: str) -> list[str]:
    """How a secret may be written; of base64, what does not depend on its surroundings."""
    data = secret.encode()
    found = [secret, data.hex(), data.hex().upper(), quote(secret)]
    for shift in range(3):
        begin, end = (shift * 8 + 5) // 6, (shift + len(data)) * 8 // 6
        found.append(base64.b64encode(bytes(shift) + data).decode()[begin:end])
    return [*found, encoded(encoded(secret))[:24]]


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        assert all(member.isfile() and member.mode == 0o600 for member in members)
        return {m.name.removeprefix("dispatcher-diag/"): archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def plant(made: Node) -> str:
    """Leave secrets wherever users and operators may; returns the pod's id."""
    client = made.client()
    client.pull(
        BUSYBOX,
        auth=pb.AuthConfig(username="u", password=PLANTED["registry"], identity_token=PLANTED["identity"]),
    )
    inner = json.dumps({"auths": {"r.example.com": {"auth": encoded(f"user:{PLANTED['base64']}")}}})
    pod = client.run_pod(
        client.pod_config(
            labels={"example.com/api-key": PLANTED["label"]},
            annotations={
                "example.com/token": PLANTED["annotation"],
                "example.com/config": json.dumps({"db": json.dumps({"users": [{"password": PLANTED["nested"]}]})}),
                "example.com/pull": encoded(inner),
            },
        )
    )
    envs = {
        "DB_PASSWORD": PLANTED["variable"],
        "GREETING": PLANTED["odd_variable"],
        "SETTINGS": json.dumps({"smtp": {"password": PLANTED["json_variable"]}}),
    }
    pod.run(
        command=["sleep", "1d"],
        envs=envs,
    )
    # An engine's message that quotes the value: it is on record, in the log and in the trace.
    container = pod.create(command=[f"/{PLANTED['odd_variable']}"], args=["--password", PLANTED["argument"]])
    with refused():
        container.start()
    return pod.id


def test_an_archive_tells_much_and_no_secret(
    node: Callable[..., Node], test_images: TestImages, tmp_path: Path
) -> None:
    made = node(config={"plugins": {"cni": {"environment": {"EXTRA": PLANTED["cni_environment"]}}}})
    conflist: dict[str, Any] = dict(made.bridge_conflist())
    conflist["plugins"][0]["backend"] = {"etcd": {"password": PLANTED["cni"]}}
    made.write_conflist(conflist)
    made.write_policy(f"apiVersion: dispatcher/v1\ndefault: {{runtime: docker}}\n# password: {PLANTED['policy']}\n")
    pod_id = plant(made)
    assert PLANTED["odd_variable"] in made.log_text(), "nothing would have to be removed"
    log = tmp_path / "more.log"
    log.write_text(
        f"Authorization: Bearer {PLANTED['log']}\nsaid {encoded(PLANTED['variable'])} and {PLANTED['cni']}\n"
        f"wrapped {encoded('user ' + PLANTED['nested'] + ' left')} {encoded(encoded(PLANTED['label']))} end\n"
    )
    target = tmp_path / "case.tar.gz"
    arguments = ("--config", str(made.config_path), "--log", str(log), "-f", str(target))
    ended = made.command("diag", "dump", *arguments, "-o", "json")
    assert ended.returncode == 0, ended.stderr
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert target.stat().st_size < 8 << 20

    found = contents(target)
    everything = b"\n".join([*found.values(), ended.stdout.encode(), ended.stderr.encode()]).decode()
    for name, secret in PLANTED.items():
        for form in forms(secret):
            assert form not in everything, f"the secret {name} is in the archive as {form}"

    manifest = json.loads(found["manifest.json"])
    assert manifest["missing"] == {}
    assert set(manifest["parts"]) | {"manifest.json"} == set(found)
    assert {
        "versions.json",
        "host.json",
        "doctor.json",
        "config/dispatcher.json",
        "config/policy.yaml",
        "config/cni/00-10-lab.json",
        "daemon/status.json",
        "daemon/records.json",
        "daemon/images.json",
        "daemon/logs.txt",
        "daemon/metrics.txt",
        "daemon/traces.json",
        "logs/00.txt",
    } <= set(found)
    records = json.loads(found["daemon/records.json"])
    (pod,) = [pod for pod in records["pods"] if pod["id"] == pod_id]
    assert pod["route"]["rule"] == "default"
    assert pod["spec"]["annotations"]["example.com/token"] == "***"
    assert {tuple(container["spec"]["names_of_variables"]) for container in records["containers"]} == {
        ("DB_PASSWORD", "GREETING", "SETTINGS"),
        (),
    }
    conditions = {item["type"]: item["status"] for item in json.loads(found["daemon/status.json"])["conditions"]}
    assert conditions["RuntimeReady"]
    assert b"dispatcher_rpc_total" in found["daemon/metrics.txt"]
    assert b"rpc refused" in found["daemon/logs.txt"]
    assert "cni.exec" in found["daemon/traces.json"].decode()
    assert json.loads(found["config/cni/00-10-lab.json"])["plugins"][0]["type"] == "bridge"
    again = made.command("diag", "dump", *arguments)
    assert again.returncode == 1
    assert "exists" in again.stderr


def test_without_a_daemon_the_rest_is_written(node: Callable[..., Node], tmp_path: Path) -> None:
    made = node()
    made.stop()
    target = tmp_path / "case.tar.gz"
    ended = made.command("diag", "dump", "--config", str(made.config_path), "-f", str(target))
    assert ended.returncode == 3
    assert "missing: daemon" in ended.stderr
    found = contents(target)
    assert "daemon" in json.loads(found["manifest.json"])["missing"]
    assert {"versions.json", "host.json", "doctor.json", "config/dispatcher.json"} <= set(found)
