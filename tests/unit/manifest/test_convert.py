"""What a manifest becomes on the wire: the same messages that a kubelet sends, and our own validation takes them."""

from __future__ import annotations

from typing import Any

import pytest

from dispatcher.cri import api_pb2 as pb
from dispatcher.cri import validate
from dispatcher.errors import InvalidRequest
from dispatcher.manifest import (
    Node,
    Placement,
    PodManifest,
    container_config,
    default_log_dir,
    parse_resolv_conf,
    pull_policy,
    read_manifest,
    run_request,
)
from dispatcher.manifest.environment import expand
from dispatcher.model import DnsConfig, NamespaceMode, Propagation

PLACE = Placement(uid="u-1", pod_dir="/pods/u-1", log_dir="/logs/u-1", cgroup_parent="/kubepods/podu-1")
NODE = Node(
    name="node-1",
    ips=("10.0.0.1", "fd00::1"),
    dns=DnsConfig(servers=("10.0.0.53",), searches=("corp",), options=("ndots:2", "edns0")),
    memory_bytes=8 << 30,
)


def manifest(container: str = "", spec: str = "", *, more: str = "", metadata: str = "name: web") -> PodManifest:
    text = (
        f"apiVersion: v1\nkind: Pod\nmetadata: {{{metadata}}}\nspec:\n  containers:\n"
        f"  - {{name: c, image: reg.io/a:1{', ' if container else ''}{container}}}\n  {spec}\n{more}"
    )
    return read_manifest(text, "m.yaml")[0]


def sandbox(found: PodManifest) -> pb.PodSandboxConfig:
    request = run_request(found, PLACE, NODE)
    validate.pod_spec(request.config, request.runtime_handler)  # our own endpoint takes it
    return request.config


def config(found: PodManifest, name: str = "c", **options: Any) -> pb.ContainerConfig:
    container = next(item for _, item in found.containers if item.name == name)
    made = container_config(found, container, PLACE, NODE, **options)
    validate.container_spec(made, validate.pod_spec(sandbox(found)))
    return made


# --------------------------------------------------------------------------------------------------------------- sandbox
def test_identity() -> None:
    found = manifest(metadata="name: web, namespace: prod, labels: {a: b}, annotations: {c: d}")
    made = sandbox(found)
    assert (made.metadata.name, made.metadata.namespace, made.metadata.uid) == ("web", "prod", "u-1")
    assert dict(made.labels) == {
        "a": "b",
        "io.kubernetes.pod.name": "web",
        "io.kubernetes.pod.namespace": "prod",
        "io.kubernetes.pod.uid": "u-1",
    }
    assert dict(made.annotations) == {"c": "d"}
    assert (made.log_directory, made.linux.cgroup_parent) == ("/logs/u-1", "/kubepods/podu-1")
    assert default_log_dir(found, "u-1") == "/var/log/pods/prod_web_u-1"


def test_namespaces_and_privilege_become_sandbox_facts() -> None:
    """The kubelet announces a privileged container on the sandbox, which is what routing sees."""
    spec = validate.pod_spec(sandbox(manifest("securityContext: {privileged: true}", "hostIPC: true")))
    assert spec.security.privileged
    assert spec.security.namespaces.ipc is NamespaceMode.NODE
    assert spec.security.namespaces.pid is NamespaceMode.CONTAINER
    assert spec.security.namespaces.network is NamespaceMode.POD
    shared = validate.pod_spec(sandbox(manifest(spec="shareProcessNamespace: true")))
    assert shared.security.namespaces.pid is NamespaceMode.POD
    assert not shared.security.privileged


def test_a_privileged_init_container_counts_too() -> None:
    found = manifest(spec="initContainers: [{name: i, image: a, securityContext: {privileged: true}}]")
    assert sandbox(found).linux.security_context.privileged
    assert config(found, "i").linux.security_context.privileged
    assert not config(found, "c").linux.security_context.privileged


def test_host_network_has_no_hostname_and_no_port_mappings() -> None:
    made = sandbox(manifest("ports: [{containerPort: 80}]", "hostNetwork: true"))
    assert made.hostname == ""
    assert not made.port_mappings
    assert made.linux.security_context.namespace_options.network == pb.NODE


def test_ports_of_all_containers_are_mapped() -> None:
    found = manifest(
        "ports: [{containerPort: 80, hostPort: 8080, hostIP: 127.0.0.1}, {containerPort: 53, protocol: UDP}]",
        "initContainers: [{name: s, image: a, restartPolicy: Always, ports: [{containerPort: 9}]}]",
    )
    made = [(p.container_port, p.host_port, p.host_ip, p.protocol) for p in sandbox(found).port_mappings]
    assert made == [(9, 0, "", pb.TCP), (80, 8080, "127.0.0.1", pb.TCP), (53, 0, "", pb.UDP)]


HOSTNAMES = [("", "web"), ("hostname: other", "other")]


@pytest.mark.parametrize(("spec", "hostname"), HOSTNAMES)
def test_hostname(spec: str, hostname: str) -> None:
    assert sandbox(manifest(spec=spec)).hostname == hostname


def test_a_long_name_makes_a_short_hostname() -> None:
    made = sandbox(manifest(metadata=f"name: {'a' * 62}-{'b' * 20}"))
    assert made.hostname == "a" * 62


DNS = [
    ("", ["10.0.0.53"], ["corp"], ["ndots:2", "edns0"]),
    ("dnsPolicy: Default", ["10.0.0.53"], ["corp"], ["ndots:2", "edns0"]),
    (
        "{dnsPolicy: None, dnsConfig: {nameservers: [1.1.1.1], searches: [x], options: [{name: ndots, value: '5'}]}}",
        ["1.1.1.1"],
        ["x"],
        ["ndots:5"],
    ),
    (
        "{dnsConfig: {nameservers: [1.1.1.1, 10.0.0.53], searches: [x, corp], options: [{name: ndots, value: '5'}]}}",
        ["10.0.0.53", "1.1.1.1"],
        ["corp", "x"],
        ["ndots:5", "edns0"],
    ),
]


@pytest.mark.parametrize(("spec", "servers", "searches", "options"), DNS)
def test_dns(spec: str, servers: list[str], searches: list[str], options: list[str]) -> None:
    made = sandbox(manifest(spec=spec.strip("{}") if not spec.startswith("{") else _block(spec))).dns_config
    assert (list(made.servers), list(made.searches), list(made.options)) == (servers, searches, options)


def _block(flow: str) -> str:
    """Flow mapping of the test table as lines of the spec."""
    policy, _, rest = flow[1:-1].partition("dnsConfig: ")
    return policy.strip(", ") + ("\n  " if policy else "") + "dnsConfig: " + rest


def test_resolv_conf_of_the_node() -> None:
    found = parse_resolv_conf(
        "# x\nnameserver 1.1.1.1 # y\nsearch a b\nsearch c d\noptions ndots:5 rotate\n;z\nfoo\nsearch\n"
    )
    assert found == DnsConfig(servers=("1.1.1.1",), searches=(), options=("ndots:5", "rotate"))


def test_sysctls_with_slashes_are_the_same_sysctls() -> None:
    made = sandbox(manifest(spec="securityContext: {sysctls: [{name: net/ipv4/ip_forward, value: '1'}]}"))
    assert dict(made.linux.sysctls) == {"net.ipv4.ip_forward": "1"}


def test_handler_is_the_runtime_class() -> None:
    assert run_request(manifest(spec="runtimeClassName: vm"), PLACE, NODE).runtime_handler == "vm"
    assert run_request(manifest(), PLACE, NODE).runtime_handler == ""


# ------------------------------------------------------------------------------------------------------------- resources
RESOURCES = [
    # (resources, shares, quota, memory, oom score)
    ("{}", 2, 0, 0, 1000),
    ("{requests: {cpu: 250m, memory: 1Gi}}", 256, 0, 0, 875),
    ("{limits: {cpu: 2, memory: 64Mi}}", 2048, 200_000, 64 << 20, -997),
    ("{requests: {cpu: 1}, limits: {cpu: 1500m}}", 1024, 150_000, 0, 999),
    ("{requests: {cpu: 0}, limits: {cpu: 1m}}", 2, 1000, 0, 999),
    ("{limits: {memory: 1e3}}", 2, 0, 1000, 999),
    ("{requests: {cpu: 500m, memory: 8Gi}}", 512, 0, 0, 3),
]


@pytest.mark.parametrize(("text", "shares", "quota", "memory", "oom"), RESOURCES)
def test_container_resources(text: str, shares: int, quota: int, memory: int, oom: int) -> None:
    made = config(manifest(f"resources: {text}")).linux.resources
    assert (made.cpu_shares, made.cpu_quota, made.memory_limit_in_bytes) == (shares, quota, memory)
    assert made.oom_score_adj == oom
    assert made.cpu_period == (100_000 if quota else 0)


def test_hugepages_are_named_as_cri_does() -> None:
    made = config(manifest("resources: {limits: {hugepages-2Mi: 4Mi, hugepages-1Gi: 1Gi}}")).linux.resources
    assert [(p.page_size, p.limit) for p in made.hugepage_limits] == [("1GB", 1 << 30), ("2MB", 4 << 20)]


def test_pod_resources_count_what_runs_at_a_time() -> None:
    """Main containers and sidecars run together; an init container runs beside the sidecars before it only."""
    found = manifest(
        "resources: {limits: {cpu: 1, memory: 100Mi}}",
        "initContainers:\n"
        "  - {name: big, image: a, resources: {limits: {cpu: 4, memory: 50Mi}}}\n"
        "  - {name: side, image: a, restartPolicy: Always, resources: {limits: {cpu: 500m, memory: 10Mi}}}\n"
        "  - {name: late, image: a, resources: {limits: {cpu: 100m, memory: 200Mi}}}",
    )
    made = sandbox(found).linux.resources
    assert made.cpu_quota == 400_000
    assert made.memory_limit_in_bytes == 210 << 20
    assert made.cpu_shares == 4096


# ------------------------------------------------------------------------------------------------------------- container
OBJECTS = """---
{apiVersion: v1, kind: ConfigMap, metadata: {name: m}, data: {k: from-map}}
---
{apiVersion: v1, kind: Secret, metadata: {name: s}, data: {p: c2VjcmV0, raw: /w==}, stringData: {q: plain}}
"""


def envs(container: str, **options: Any) -> dict[str, bytes]:
    return {env.key: env.value for env in config(manifest(container, more=OBJECTS), **options).envs}


def test_environment() -> None:
    found = envs(
        "envFrom: [{configMapRef: {name: m}, prefix: M_}, {secretRef: {name: s}}], env: ["
        "{name: A, value: one}, {name: B, value: $(A)-$(M_k)-$(NOPE)-$$(A)}, {name: A, value: two},"
        "{name: C, valueFrom: {secretKeyRef: {name: s, key: p}}},"
        "{name: D, valueFrom: {configMapKeyRef: {name: m, key: gone, optional: true}}},"
        "{name: q, value: mine}]"
    )
    assert found == {
        "M_k": b"from-map",
        "p": b"secret",
        "raw": b"\xff",
        "B": b"one-from-map-$(NOPE)-$(A)",
        "A": b"two",
        "C": b"secret",
        "q": b"mine",
    }
    assert list(found) == ["M_k", "p", "raw", "B", "A", "C", "q"]


FIELDS = [
    ("metadata.name", b"web"),
    ("metadata.namespace", b"default"),
    ("metadata.uid", b"u-1"),
    ("metadata.labels['a']", b"b"),
    ("metadata.annotations['x/y']", b"z"),
    ("metadata.labels['gone']", b""),
    ("spec.nodeName", b"node-1"),
    ("status.hostIP", b"10.0.0.1"),
    ("status.hostIPs", b"10.0.0.1,fd00::1"),
    ("status.podIP", b"10.1.0.2"),
    ("status.podIPs", b"10.1.0.2,fd01::2"),
]


@pytest.mark.parametrize(("path", "value"), FIELDS)
def test_fields_of_the_pod(path: str, value: bytes) -> None:
    found = manifest(
        f'env: [{{name: A, valueFrom: {{fieldRef: {{fieldPath: "{path}"}}}}}}]',
        metadata="name: web, labels: {a: b}, annotations: {x/y: z}",
    )
    assert config(found, pod_ips=("10.1.0.2", "fd01::2")).envs[0].value == value


EXPANSIONS = [
    ("$(A)", "1"),
    ("$$(A)", "$(A)"),
    ("$$$(A)", "$1"),
    ("$(B)", "$(B)"),
    ("$A $ $( $(A", "$A $ $( $(A"),
    ("$(A)$(A)", "11"),
    ("$()", "$()"),
]


@pytest.mark.parametrize(("text", "value"), EXPANSIONS)
def test_expansion(text: str, value: str) -> None:
    assert expand(text, {"A": "1"}) == value


def test_command_and_arguments_see_the_environment() -> None:
    made = config(manifest("command: [run, $(A)], args: [$(A)$(B)], env: [{name: A, value: x}]"))
    assert (list(made.command), list(made.args)) == (["run", "x"], ["x$(B)"])


def test_labels_annotations_and_log_path() -> None:
    made = config(manifest("ports: [{containerPort: 80}]", "terminationGracePeriodSeconds: 5"), attempt=3)
    assert made.metadata.attempt == 3
    assert made.log_path == "c/3.log"
    assert made.labels["io.kubernetes.container.name"] == "c"
    assert made.annotations["io.kubernetes.container.restartCount"] == "3"
    assert made.annotations["io.kubernetes.pod.terminationGracePeriod"] == "5"
    assert made.annotations["io.kubernetes.container.ports"] == '[{"containerPort":80}]'


def test_the_image_is_named_by_its_id_once_it_is_pulled() -> None:
    made = config(manifest(), image=pb.Image(id="sha256:00"))
    assert (made.image.image, made.image.user_specified_image) == ("sha256:00", "reg.io/a:1")
    assert config(manifest()).image.image == "reg.io/a:1"


def test_mounts() -> None:
    found = manifest(
        "volumeMounts: [{name: e, mountPath: /e, subPath: a/b}, {name: h, mountPath: /h, readOnly: true,"
        " recursiveReadOnly: Enabled}, {name: m, mountPath: /m}, {name: h, mountPath: /p,"
        " mountPropagation: HostToContainer}]",
        "volumes: [{name: e, emptyDir: {}}, {name: h, hostPath: {path: /srv}}, {name: m, configMap: {name: m}}]",
        more=OBJECTS,
    )
    spec = validate.container_spec(config(found), validate.pod_spec(sandbox(found)))
    shown = [(m.container_path, m.host_path, m.readonly, m.recursive_readonly, m.propagation) for m in spec.mounts]
    private = Propagation.PRIVATE
    assert shown == [
        ("/e", "/pods/u-1/volumes/kubernetes.io~empty-dir/e/a/b", False, False, private),
        ("/h", "/srv", True, True, private),
        ("/m", "/pods/u-1/volumes/kubernetes.io~configmap/m", True, False, private),
        ("/p", "/srv", False, False, Propagation.HOST_TO_CONTAINER),
        ("/dev/termination-log", "/pods/u-1/containers/c/0", False, False, private),
    ]


# -------------------------------------------------------------------------------------------------------------- security
ALICE = pb.Image(id="sha256:00", username="alice")
NUMBERED = pb.Image(id="sha256:00", uid=pb.Int64Value(value=7))

USERS = [
    # (pod, container, image, uid, user name, gid)
    ("", "", None, 0, "", None),
    ("", "", ALICE, None, "alice", None),
    ("", "", NUMBERED, 7, "", None),
    ("runAsUser: 5", "", ALICE, 5, "", None),
    ("runAsUser: 5, runAsGroup: 6", "runAsUser: 8", ALICE, 8, "", 6),
    ("runAsGroup: 6", "", NUMBERED, 7, "", 6),
    ("runAsGroup: 6", "", ALICE, None, "alice", 6),
]


@pytest.mark.parametrize(("pod", "container", "image", "expected"), [(*row[:3], row[3:]) for row in USERS])
def test_user(pod: str, container: str, image: pb.Image | None, expected: tuple[int | None, str, int | None]) -> None:
    found = manifest(f"securityContext: {{{container}}}", f"securityContext: {{{pod}}}")
    made = config(found, image=image).linux.security_context
    uid = made.run_as_user.value if made.HasField("run_as_user") else None
    gid = made.run_as_group.value if made.HasField("run_as_group") else None
    assert (uid, made.run_as_username, gid) == expected


ROOT = [
    ("runAsNonRoot: true", "", None, "would run as root"),
    ("runAsNonRoot: true", "runAsUser: 0", NUMBERED, "would run as root"),
    ("", "runAsNonRoot: true", ALICE, 'names the user "alice"'),
]


@pytest.mark.parametrize(("pod", "container", "image", "said"), ROOT)
def test_run_as_non_root_is_held(pod: str, container: str, image: pb.Image | None, said: str) -> None:
    found = manifest(f"securityContext: {{{container}}}", f"securityContext: {{{pod}}}")
    with pytest.raises(InvalidRequest, match=said):
        config(found, image=image)


def test_run_as_non_root_lets_others_through() -> None:
    config(manifest("securityContext: {runAsNonRoot: false}", "securityContext: {runAsNonRoot: true}"))
    config(manifest("securityContext: {runAsNonRoot: true}"), image=NUMBERED)


def test_other_security_settings() -> None:
    found = manifest(
        "securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false,"
        " capabilities: {add: [NET_ADMIN], drop: [ALL]}, procMount: Unmasked,"
        " seccompProfile: {type: Localhost, localhostProfile: a/b.json}}",
        "securityContext: {fsGroup: 9, supplementalGroups: [10], supplementalGroupsPolicy: Strict,"
        " seccompProfile: {type: RuntimeDefault}, appArmorProfile: {type: Unconfined}}",
    )
    made = config(found).linux.security_context
    assert made.readonly_rootfs
    assert made.no_new_privs
    assert list(made.capabilities.add_capabilities) == ["NET_ADMIN"]
    assert list(made.capabilities.drop_capabilities) == ["ALL"]
    assert not made.masked_paths
    assert made.seccomp.localhost_ref == "/var/lib/kubelet/seccomp/a/b.json"
    assert made.apparmor.profile_type == pb.SecurityProfile.Unconfined
    assert list(made.supplemental_groups) == [9, 10]
    assert made.supplemental_groups_policy == pb.Strict


def test_defaults_of_security() -> None:
    made = config(manifest()).linux.security_context
    assert "/proc/kcore" in made.masked_paths
    assert "/proc/sys" in made.readonly_paths
    assert made.HasField("seccomp")
    assert made.seccomp.profile_type == pb.SecurityProfile.Unconfined
    assert not made.HasField("apparmor")
    assert not made.no_new_privs


def test_a_seccomp_profile_cannot_climb() -> None:
    found = manifest("securityContext: {seccompProfile: {type: Localhost, localhostProfile: ../../x}}")
    with pytest.raises(InvalidRequest, match="relative path"):
        config(found)


POLICIES = [
    ("a", "", "Always"),
    ("a:latest", "", "Always"),
    ("a:1", "", "IfNotPresent"),
    ("reg:5000/a", "", "Always"),
    ("a@sha256:00", "", "IfNotPresent"),
    ("a", "Never", "Never"),
]


@pytest.mark.parametrize(("image", "given", "expected"), POLICIES)
def test_pull_policy(image: str, given: str, expected: str) -> None:
    text = f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{containers: [{{name: c, image: '{image}'"
    text += f", imagePullPolicy: {given}}}]}}" if given else "}]}"
    ((_, container),) = read_manifest(text, "m.yaml")[0].containers
    assert pull_policy(container) == expected
