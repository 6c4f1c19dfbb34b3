"""Reading manifests: what is understood, and that everything else is refused by its name and place."""

from __future__ import annotations

import pytest

from dispatcher.manifest import ContainerKind, PodManifest, read_manifest
from dispatcher.yaml_marks import YamlError


def pod(spec: str, *, metadata: str = "{name: web}") -> str:
    return f"apiVersion: v1\nkind: Pod\nmetadata: {metadata}\nspec:\n{spec}"


def container(fields: str = "") -> str:
    return pod(f"  containers:\n  - name: c\n    image: a\n{fields}")


def problems(text: str) -> list[str]:
    with pytest.raises(YamlError) as caught:
        read_manifest(text, "m.yaml")
    return str(caught.value).splitlines()


def only(text: str) -> PodManifest:
    (found,) = read_manifest(text, "m.yaml")
    return found


UNKNOWN = [
    (container("    livenessProbe: {}"), "8:5: spec.containers[0].livenessProbe: unknown key."),
    (container("    imagePullPolicy: always"), "8:22: spec.containers[0].imagePullPolicy: 'always' is not one of Always"),
    (container("    resources: {limits: {nvidia.com/gpu: 1}}"), "8:26: spec.containers[0].resources.limits.nvidia.com/gpu: unknown key."),
    (container("    securityContext: {priviledged: true}"), '8:23: spec.containers[0].securityContext.priviledged: unknown key. Did you mean "privileged"?'),
    (container("  hostUsers: false"), "8:3: spec.hostUsers: unknown key."),
    (container("  hostnetwork: true"), '8:3: spec.hostnetwork: unknown key. Did you mean "hostNetwork"?'),
    (container("  volumes: [{name: v, persistentVolumeClaim: {claimName: x}}]"), "8:23: spec.volumes[0].persistentVolumeClaim: unknown key."),
    (container("  volumes: [{name: v, emptyDir: {medium: Memory}}]"), '8:42: spec.volumes[0].emptyDir.medium: only "" (the disk) can be had here'),
    (container("    env: [{name: A, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}]"), "8:33: spec.containers[0].env[0].valueFrom.resourceFieldRef: unknown key."),
    ("apiVersion: v1\nkind: Deployment", "2:7: kind: only Pod, ConfigMap, Secret can be read here."),
    ("apiVersion: v1\nkind: pod", '2:7: kind: only Pod, ConfigMap, Secret can be read here. Did you mean "Pod"?'),
    ("[1]", "1:1: an object with apiVersion and kind is expected here"),
    ("", "1:1: the file holds no Pod"),
    ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}", "1:1: the file holds no Pod"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), UNKNOWN)
def test_what_is_not_understood_is_refused_by_name(text: str, said: str) -> None:
    found = problems(text)
    assert any(line.startswith(f"m.yaml:{said}") for line in found), found


MISTAKES = [
    (pod("  containers: []"), "5:15: spec.containers: "),
    (container("    command: sh"), "8:14: spec.containers[0].command: "),
    (container("    ports: [{containerPort: 70000}]"), "8:29: spec.containers[0].ports[0].containerPort: "),
    (container("    resources: {limits: {memory: 1Gb}}"), "8:34: spec.containers[0].resources.limits.memory: '1Gb' is not a quantity"),
    (container("    resources: {requests: {cpu: 2}, limits: {cpu: 1}}"), "8:16: spec.containers[0].resources: the request of cpu is larger than its limit"),
    (container("    resources: {limits: {hugepages-2: 1}}"), "8:26: spec.containers[0].resources.limits.hugepages-2: unknown key."),
    (container("    env: [{name: A, value: 1}]"), "8:28: spec.containers[0].env[0].value: should be a valid string, not 1"),
    (container("    env: [{name: A=B, value: x}]"), "8:18: spec.containers[0].env[0].name: 'A=B' is no name of an environment variable"),
    (container("    env: [{name: A, valueFrom: {}}]"), "8:32: spec.containers[0].env[0].valueFrom: exactly one of"),
    (container("    env: [{name: A, valueFrom: {fieldRef: {fieldPath: spec.foo}}}]"), '8:55: spec.containers[0].env[0].valueFrom.fieldRef.fieldPath: "spec.foo" is not known'),
    (container("    env: [{name: A, valueFrom: {configMapKeyRef: {name: x, key: k}}}]"), '8:57: spec.containers[0].env[0].valueFrom.configMapKeyRef.name: this file holds no ConfigMap "x" in namespace default.'),
    (container("    envFrom: [{secretRef: {name: x}}]"), '8:34: spec.containers[0].envFrom[0].secretRef.name: this file holds no Secret "x"'),
    (container("    envFrom: [{prefix: A_}]"), "8:15: spec.containers[0].envFrom[0]: exactly one of"),
    (container("    volumeMounts: [{name: v, mountPath: /x}]"), '8:27: spec.containers[0].volumeMounts[0].name: the pod has no volume "v".'),
    (container("    volumeMounts: [{name: v, mountPath: x}]\n  volumes: [{name: v, emptyDir: {}}]"), "8:41: spec.containers[0].volumeMounts[0].mountPath: 'x' has to be an absolute path"),
    (container("    volumeMounts: [{name: v, mountPath: /x, subPath: ../y}]\n  volumes: [{name: v, emptyDir: {}}]"), "8:54: spec.containers[0].volumeMounts[0].subPath: '../y' has to be a relative path"),
    (container("    volumeMounts: [{name: v, mountPath: /x, mountPropagation: Bidirectional}]\n  volumes: [{name: v, emptyDir: {}}]"), "8:63: spec.containers[0].volumeMounts[0].mountPropagation: Bidirectional needs a privileged"),
    (container("    volumeMounts: [{name: v, mountPath: /x, recursiveReadOnly: Enabled}]\n  volumes: [{name: v, emptyDir: {}}]"), "8:64: spec.containers[0].volumeMounts[0].recursiveReadOnly: this needs readOnly"),
    (container("    volumeMounts: [{name: v, mountPath: /x}, {name: v, mountPath: /x}]\n  volumes: [{name: v, emptyDir: {}}]"), '8:67: spec.containers[0].volumeMounts[1].mountPath: mount path "/x" stands already in line 8'),
    (container("  volumes: [{name: v}]"), "8:13: spec.volumes[0]: exactly one of emptyDir"),
    (container("  volumes: [{name: v, emptyDir: {}}, {name: v, emptyDir: {}}]"), '8:45: spec.volumes[1].name: volume "v" stands already in line 8'),
    (container("  volumes: [{name: v, configMap: {name: x}}]"), '8:34: spec.volumes[0].configMap: this file holds no ConfigMap "x"'),
    (container("  initContainers: [{name: c, image: b}]"), '6:11: spec.containers[0].name: container "c" stands already in line 8'),
    (container("    restartPolicy: Always"), "8:5: spec.containers[0].restartPolicy: only init containers can have a restartPolicy"),
    (container("    ports: [{containerPort: 80, hostPort: 8080}]\n  hostNetwork: true"), "8:13: spec.containers[0].ports[0]: with hostNetwork, hostPort equals containerPort"),
    (container("    ports: [{containerPort: 80, hostPort: 80}, {containerPort: 81, hostPort: 80}]"), "8:78: spec.containers[0].ports[1].hostPort: host port"),
    (container("    securityContext: {privileged: true, allowPrivilegeEscalation: false}"), "8:22: spec.containers[0].securityContext: a privileged container cannot have"),
    (container("    securityContext: {seccompProfile: {type: Localhost}}"), "8:39: spec.containers[0].securityContext.seccompProfile: localhostProfile belongs to"),
    (container("  dnsPolicy: None"), "8:14: spec.dnsPolicy: dnsPolicy None needs nameservers"),
    (container("  hostPID: true\n  shareProcessNamespace: true"), "5:3: spec: hostPID and shareProcessNamespace exclude each other"),
    (pod("  containers: [{name: C, image: a}]"), "5:23: spec.containers[0].name: 'C' has to be 1 to 63 of"),
    (pod("  containers: [{name: c, image: ''}]"), "5:33: spec.containers[0].image: "),
    (pod("  containers: [{name: c, image: a}]", metadata="{name: ../../etc}"), "3:18: metadata.name: '../../etc' has to be"),
    (pod("  containers: [{name: c, image: a}]", metadata="{name: a, uid: ../x}"), "3:26: metadata.uid: "),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), MISTAKES)
def test_mistakes_are_placed(text: str, said: str) -> None:
    found = problems(text)
    assert len(found) == 1, found
    assert found[0].startswith(f"m.yaml:{said}"), found


def test_all_mistakes_of_all_documents_come_at_once() -> None:
    text = (
        container("    foo: 1")
        + "\n---\n"
        + "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata: {k: '%%'}\nbar: 2"
    )
    found = problems(text)
    assert [line.split(": ")[0] for line in found] == ["m.yaml:8:5", "m.yaml:14:1"]


def test_secrets_and_config_maps_are_checked() -> None:
    found = problems(
        container()
        + "\n---\n{apiVersion: v1, kind: Secret, metadata: {name: s}, data: {k: '%%'}}"
        + "\n---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: m}, data: {k: a}, binaryData: {k: YQ==}}"
        + "\n---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: m}}"
        + "\n---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: n}, data: {../k: a}}"
    )
    assert len(found) == 4, found
    assert "data.k: this is not base64" in found[0]
    assert "binaryData.k: this key stands in data already" in found[1]
    assert 'a ConfigMap "m" stands above already' in found[2]
    assert "has to be 1 to 253 of" in found[3]
    assert "%%" not in "".join(found)


def test_objects_of_another_namespace_are_not_seen() -> None:
    text = container("    envFrom: [{secretRef: {name: s}}]")
    other = "\n---\n{apiVersion: v1, kind: Secret, metadata: {name: s, namespace: other}}"
    assert "no Secret" in problems(text + other)[0]
    assert only(text + other.replace("other", "default")).objects


def test_optional_references_may_lead_nowhere() -> None:
    only(
        container(
            "    envFrom: [{secretRef: {name: x, optional: true}}]\n"
            "    env: [{name: A, valueFrom: {configMapKeyRef: {name: x, key: k, optional: true}}}]\n"
            "  volumes: [{name: v, secret: {secretName: x, optional: true}}]"
        )
    )


def test_several_pods_come_in_order() -> None:
    text = container() + "\n---\n" + container().replace("web", "db")
    assert [found.pod.metadata.name for found in read_manifest(text, "m.yaml")] == ["web", "db"]


def test_what_kubectl_writes_by_itself_is_understood() -> None:
    text = (
        "apiVersion: v1\nkind: Pod\nmetadata:\n  creationTimestamp: null\n  labels: {run: web}\n  name: web\n"
        "spec:\n  containers:\n  - image: a\n    name: web\n    resources: {}\n  dnsPolicy: ClusterFirst\n"
        "  restartPolicy: Always\nstatus: {}\n"
    )
    assert only(text).pod.metadata.labels == {"run": "web"}


def test_containers_come_in_the_order_in_which_they_start() -> None:
    text = container(
        "  initContainers:\n  - {name: one, image: a}\n  - {name: two, image: a, restartPolicy: Always}\n"
        "  - {name: three, image: a}"
    )
    assert [(kind, item.name) for kind, item in only(text).containers] == [
        (ContainerKind.INIT, "one"),
        (ContainerKind.SIDECAR, "two"),
        (ContainerKind.INIT, "three"),
        (ContainerKind.MAIN, "c"),
    ]


def test_octal_modes_are_octal() -> None:
    text = container("  volumes: [{name: v, secret: {secretName: s, defaultMode: 0400}}]")
    text += "\n---\n{apiVersion: v1, kind: Secret, metadata: {name: s}}"
    volume = only(text).spec.volumes[0].secret
    assert volume is not None
    assert volume.default_mode == 0o400
