"""From the text of a manifest to pods with the ConfigMaps and Secrets that they use, or to all problems at once."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dispatcher.manifest import schema
from dispatcher.manifest.environment import is_field_path
from dispatcher.manifest.pods import ObjectData, ObjectKind, PodManifest
from dispatcher.yaml_marks import Document, Problem, YamlError, did_you_mean, load_all, validate

Path = tuple[str | int, ...]

_MODELS = {"Pod": schema.Pod, "ConfigMap": schema.ConfigMap, "Secret": schema.Secret}


def read_manifest(text: str | bytes, file: str) -> tuple[PodManifest, ...]:
    """Return all pods of a manifest, in order. `file` is used in messages only.

    Raises:
        YamlError: with everything that is wrong, at its line and column: unknown fields by name, references to
            objects that the file does not hold, names that occur twice.
    """
    documents = load_all(text, file)
    problems: list[Problem] = []
    parsed: list[tuple[Document, Any]] = []
    for document in documents:
        model = _model_of(document, problems)
        if model is None:
            continue
        try:
            parsed.append((document, validate(document, model)))
        except YamlError as error:
            problems += error.problems

    objects = _gather(parsed, problems)
    pods = []
    for document, item in parsed:
        if isinstance(item, schema.Pod):
            here = {(kind, name): data for (kind, ns, name), data in objects.items() if ns == item.metadata.namespace}
            pods.append(PodManifest(pod=item, objects=here))
            # With a broken object in the file, what refers to it would be reported too: noise.
            problems += _check_pod(document, pods[-1]) if len(parsed) == len(documents) else []
    if not pods and not problems:
        problems.append(Problem(file, 1, 1, "the file holds no Pod"))
    if problems:
        raise YamlError(problems)
    return tuple(pods)


def _model_of(document: Document, problems: list[Problem]) -> type[Any] | None:
    if not isinstance(document.data, dict):
        problems.append(document.problem((), "an object with apiVersion and kind is expected here"))
        return None
    kind = document.data.get("kind")
    if isinstance(kind, str) and kind in _MODELS:
        return _MODELS[kind]
    hint = did_you_mean(kind, _MODELS) if isinstance(kind, str) else ""
    problems.append(document.problem(("kind",), f"only {', '.join(_MODELS)} can be read here.{hint}"))
    return None


def _gather(
    parsed: Iterable[tuple[Document, Any]], problems: list[Problem]
) -> dict[tuple[ObjectKind, str, str], ObjectData]:
    objects: dict[tuple[ObjectKind, str, str], ObjectData] = {}
    seen: set[tuple[str, str, str]] = set()
    for document, item in parsed:
        key = (item.kind, item.metadata.namespace, item.metadata.name)
        if key in seen:
            problems.append(document.problem(("metadata", "name"), f'a {item.kind} "{key[2]}" stands above already'))
        seen.add(key)
        if isinstance(item, schema.ConfigMap):
            binary = _decode(document, "binaryData", item.binary_data, problems)
            plain = {name: text.encode() for name, text in item.data.items()}
            problems += [
                document.problem(("binaryData", name), "this key stands in data already", key=True)
                for name in sorted(set(binary) & set(plain))
            ]
            objects["ConfigMap", key[1], key[2]] = ObjectData(text=item.data, files={**plain, **binary})
        elif isinstance(item, schema.Secret):
            files = _decode(document, "data", item.data, problems)
            files |= {name: text.encode() for name, text in item.string_data.items()}
            # Kubernetes hands bytes that are no text to the variable as they are; here they become the closest text.
            text = {name: value.decode(errors="surrogateescape") for name, value in files.items()}
            objects["Secret", key[1], key[2]] = ObjectData(text=text, files=files)
    return objects


def _decode(document: Document, section: str, values: Mapping[str, str], problems: list[Problem]) -> dict[str, bytes]:
    decoded = {}
    for name, value in values.items():
        try:
            decoded[name] = base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            problems.append(document.problem((section, name), "this is not base64"))
    return decoded


# -------------------------------------------------------------------------------------------------------------- checks
def _check_pod(document: Document, manifest: PodManifest) -> Iterator[Problem]:
    spec = manifest.spec
    volumes = {volume.name for volume in spec.volumes}
    listed = [
        *((("spec", "initContainers", index), item) for index, item in enumerate(spec.init_containers)),
        *((("spec", "containers", index), item) for index, item in enumerate(spec.containers)),
    ]
    paths = [(*path, "name") for path, _ in listed]
    yield from _twice(document, [item.name for _, item in listed], paths, "container")
    names = [volume.name for volume in spec.volumes]
    yield from _twice(document, names, [("spec", "volumes", i, "name") for i in range(len(names))], "volume")

    if spec.dns_policy == "None" and not spec.dns_config.nameservers:
        yield document.problem(("spec", "dnsPolicy"), "dnsPolicy None needs nameservers in dnsConfig")
    for index, volume in enumerate(spec.volumes):
        yield from _check_volume(document, manifest, volume, ("spec", "volumes", index))
    for path, container in listed:
        yield from _check_container(document, manifest, container, path, volumes)

    ports = [
        ((*path, "ports", index, "hostPort"), f"{port.host_ip} {port.host_port} {port.protocol}")
        for path, container in listed
        for index, port in enumerate(container.ports)
        if port.host_port is not None
    ]
    yield from _twice(document, [port for _, port in ports], [path for path, _ in ports], "host port")


def _check_volume(document: Document, manifest: PodManifest, volume: schema.Volume, path: Path) -> Iterator[Problem]:
    source: schema.ConfigMapVolume | schema.SecretVolume
    if volume.config_map is not None:
        kind: ObjectKind = "ConfigMap"
        where, name, source = (*path, "configMap"), volume.config_map.name, volume.config_map
    elif volume.secret is not None:
        kind, where, name, source = "Secret", (*path, "secret"), volume.secret.secret_name, volume.secret
    else:
        return
    data = manifest.objects.get((kind, name))
    if data is None:
        if not source.optional:
            yield document.problem(where, _missing(manifest, kind, name))
        return
    for index, item in enumerate(source.items):
        if item.key not in data.files and not source.optional:
            hint = did_you_mean(item.key, data.files)
            yield document.problem((*where, "items", index, "key"), f'{kind} "{name}" has no key "{item.key}".{hint}')


def _check_container(
    document: Document, manifest: PodManifest, container: schema.Container, path: Path, volumes: set[str]
) -> Iterator[Problem]:
    if container.restart_policy is not None and path[1] == "containers":
        yield document.problem((*path, "restartPolicy"), "only init containers can have a restartPolicy", key=True)
    if manifest.spec.host_network:
        for index, port in enumerate(container.ports):
            if port.host_port not in (None, port.container_port):
                yield document.problem((*path, "ports", index), "with hostNetwork, hostPort equals containerPort")

    mounts = container.volume_mounts
    yield from _twice(
        document,
        [mount.mount_path for mount in mounts],
        [(*path, "volumeMounts", index, "mountPath") for index in range(len(mounts))],
        "mount path",
    )
    for index, mount in enumerate(mounts):
        where = (*path, "volumeMounts", index)
        if mount.name not in volumes:
            hint = did_you_mean(mount.name, volumes)
            yield document.problem((*where, "name"), f'the pod has no volume "{mount.name}".{hint}')
        if mount.mount_propagation == "Bidirectional" and not container.security_context.privileged:
            yield document.problem((*where, "mountPropagation"), "Bidirectional needs a privileged container")
        if mount.recursive_read_only != "Disabled" and (not mount.read_only or mount.mount_propagation != "None"):
            yield document.problem((*where, "recursiveReadOnly"), "this needs readOnly: true and no mountPropagation")

    for index, entry in enumerate(container.env):
        if entry.value_from is not None:
            yield from _check_source(document, manifest, entry.value_from, (*path, "env", index, "valueFrom"))
    for index, entries in enumerate(container.env_from):
        for kind, ref, word in (
            ("ConfigMap", entries.config_map_ref, "configMapRef"),
            ("Secret", entries.secret_ref, "secretRef"),
        ):
            if ref is not None and not ref.optional and (kind, ref.name) not in manifest.objects:
                yield document.problem((*path, "envFrom", index, word, "name"), _missing(manifest, kind, ref.name))


def _check_source(document: Document, manifest: PodManifest, source: schema.ValueFrom, path: Path) -> Iterator[Problem]:
    if source.field_ref is not None:
        if not is_field_path(source.field_ref.field_path):
            message = f'"{source.field_ref.field_path[:80]}" is not known to fieldRef here'
            yield document.problem((*path, "fieldRef", "fieldPath"), message)
        return
    kind, ref, word = (
        ("ConfigMap", source.config_map_key_ref, "configMapKeyRef")
        if source.config_map_key_ref is not None
        else ("Secret", source.secret_key_ref, "secretKeyRef")
    )
    if ref is None or ref.optional:
        return
    data = manifest.objects.get((kind, ref.name))  # type: ignore[arg-type]
    if data is None:
        yield document.problem((*path, word, "name"), _missing(manifest, kind, ref.name))
    elif ref.key not in data.text:
        hint = did_you_mean(ref.key, data.text)
        yield document.problem((*path, word, "key"), f'{kind} "{ref.name}" has no key "{ref.key}".{hint}')


def _missing(manifest: PodManifest, kind: str, name: str) -> str:
    known = [known for held, known in manifest.objects if held == kind]
    return (
        f'this file holds no {kind} "{name}" in namespace {manifest.pod.metadata.namespace}.{did_you_mean(name, known)}'
    )


def _twice(document: Document, names: Sequence[str], paths: Sequence[Path], what: str) -> Iterator[Problem]:
    seen: dict[str, Path] = {}
    for name, path in zip(names, paths, strict=True):
        if name in seen:
            line = document.mark(seen[name]).line
            yield document.problem(path, f'{what} "{name.strip()}" stands already in line {line}')
        else:
            seen[name] = path
