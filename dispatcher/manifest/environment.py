"""The environment of a container as the kubelet computes it: references resolved, $(NAME) expanded. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dispatcher.manifest import schema
from dispatcher.manifest.pods import PodManifest

_EXPANSION = re.compile(r"\$(?:\$|\((?P<name>[^)]*)\))")
_MAP_ENTRY = re.compile(r"metadata\.(?P<map>labels|annotations)\['(?P<key>[^']{1,317})'\]")
_PLAIN_FIELDS = frozenset(
    {
        "metadata.name",
        "metadata.namespace",
        "metadata.uid",
        "spec.nodeName",
        "status.hostIP",
        "status.hostIPs",
        "status.podIP",
        "status.podIPs",
    }
)


def is_field_path(path: str) -> bool:
    """True for what a fieldRef may name."""
    return path in _PLAIN_FIELDS or _MAP_ENTRY.fullmatch(path) is not None


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace $(NAME) by its value and $$ by $. What is not known stays as it is, as in Kubernetes."""

    def replacement(match: re.Match[str]) -> str:
        name = match["name"]
        return "$" if name is None else variables.get(name, match[0])

    return _EXPANSION.sub(replacement, text)


def make_environment(
    manifest: PodManifest,
    container: schema.Container,
    *,
    uid: str,
    node_name: str,
    node_ips: tuple[str, ...],
    pod_ips: tuple[str, ...],
) -> dict[str, str]:
    """Return the variables of a container in order. `envFrom` comes first, `env` wins; later entries win over earlier.

    Keys of an `envFrom` that are no names of variables are left out, as the kubelet does.
    """
    variables: dict[str, str] = {}
    for source in container.env_from:
        ref = source.config_map_ref or source.secret_ref
        data = manifest.objects.get(("ConfigMap" if source.config_map_ref else "Secret", ref.name)) if ref else None
        for key, value in sorted(data.text.items()) if data else ():
            name = source.prefix + key
            if name and "=" not in name and name.isprintable() and name.isascii():
                variables[name] = value

    fields = {
        "metadata.name": manifest.pod.metadata.name,
        "metadata.namespace": manifest.pod.metadata.namespace,
        "metadata.uid": uid,
        "spec.nodeName": node_name,
        "status.hostIP": node_ips[0] if node_ips else "",
        "status.hostIPs": ",".join(node_ips),
        "status.podIP": pod_ips[0] if pod_ips else "",
        "status.podIPs": ",".join(pod_ips),
    }
    for entry in container.env:
        value_or_none = _value_of(manifest, entry, variables, fields)
        if value_or_none is not None:
            variables.pop(entry.name, None)
            variables[entry.name] = value_or_none
    return variables


def _value_of(
    manifest: PodManifest, entry: schema.EnvEntry, variables: Mapping[str, str], fields: Mapping[str, str]
) -> str | None:
    """The value of one entry, or None where an optional reference leads nowhere."""
    source = entry.value_from
    if source is None:
        return expand(entry.value, variables)
    if source.field_ref is not None:
        path = source.field_ref.field_path
        match = _MAP_ENTRY.fullmatch(path)
        if match is None:
            return fields[path]
        metadata = manifest.pod.metadata
        return (metadata.labels if match["map"] == "labels" else metadata.annotations).get(match["key"], "")
    ref = source.config_map_key_ref or source.secret_key_ref
    if ref is None:
        return None
    data = manifest.objects.get(("ConfigMap" if source.config_map_key_ref else "Secret", ref.name))
    return data.text.get(ref.key) if data else None
