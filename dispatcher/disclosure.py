"""What of the records may leave the node for a support case, and what must not.

What users write is shown by its names only: variables without values, labels and annotations with their keys, of a
command its program and how many words follow. Everything else passes the guards of the log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from dispatcher.model import ContainerRecord, PodRecord
from dispatcher.observability.redaction import REDACTED, redact
from dispatcher.store import Store

# Labels and annotations that the kubelet writes: names, ids and counters.
_OF_THE_KUBELET: Final = re.compile(
    r"io\.kubernetes\.(pod\.(name|namespace|uid|terminationGracePeriod)|container\.(name|hash|restartCount|terminationMessagePath|terminationMessagePolicy))"
)
# Variables whose values are no secrets, and would be missing everywhere else if they were treated as such.
_ORDINARY_VARIABLE: Final = re.compile(
    r"PATH|HOME|HOSTNAME|TERM|LANG|LC_\w+|PWD|SHLVL|TZ|USER|.*_SERVICE_(HOST|PORT\w*)|.*_PORT(_\w+)?"
)
_MAX_CHARS: Final = 2 << 20


def disclose(store: Store) -> str:
    """Return all records as JSON, without what users wrote into them."""
    return json.dumps(
        {
            "pods": [_common(record) for record in store.list_pods()],
            "containers": [_container(record) for record in store.list_containers()],
            "set_aside": [asdict(item) for item in store.set_aside],
        },
        default=str,
    )


def known_secrets(store: Store) -> str:
    """Return what users wrote, as a JSON list of [kind, name, value]: for our own command, which removes it elsewhere.

    `kind` is "variable" or "key" (of a label or annotation). Nobody is told who could not read it from the containers
    anyway: the socket is root's. It is never written anywhere.
    """
    found: set[tuple[str, str, str]] = set()
    records: list[PodRecord | ContainerRecord] = [*store.list_pods(), *store.list_containers()]
    for record in records:
        for mapping in (record.spec.labels, record.spec.annotations):
            found |= {("key", key, value) for key, value in mapping.items() if not _OF_THE_KUBELET.fullmatch(key)}
        if isinstance(record, ContainerRecord):
            found |= {
                ("variable", variable.key, variable.value.decode("utf-8", "replace"))
                for variable in record.spec.envs
                if not _ORDINARY_VARIABLE.fullmatch(variable.key)
            }
    kept, length = [], 0
    for item in sorted(found):
        length += sum(map(len, item))
        if length > _MAX_CHARS:
            break
        kept.append(item)
    return json.dumps({"told": kept, "left_out": len(found) - len(kept)})


def _keys(mapping: Mapping[str, str]) -> dict[str, str]:
    return {key: value if _OF_THE_KUBELET.fullmatch(key) else REDACTED for key, value in mapping.items()}


def _common(record: PodRecord | ContainerRecord) -> dict[str, Any]:
    shown = asdict(record)
    spec = shown.pop("spec")
    spec["labels"], spec["annotations"] = _keys(record.spec.labels), _keys(record.spec.annotations)
    return {**{key: redact(value, key) for key, value in shown.items()}, "spec": spec}


def _container(record: ContainerRecord) -> dict[str, Any]:
    shown = _common(record)
    spec = shown["spec"]
    del spec["envs"]
    spec["names_of_variables"] = [variable.key for variable in record.spec.envs]
    spec["command"] = [*record.spec.command[:1], f"and {max(0, len(record.spec.command) - 1)} more"]
    spec["args"] = [f"{len(record.spec.args)} words"]
    return shown
