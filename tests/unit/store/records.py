"""Records for tests: plain ones to begin with, and strategies that fill every field with anything its type allows."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from dispatcher.model import (
    Attachment,
    ContainerMetadata,
    ContainerRecord,
    ContainerSpec,
    Isolation,
    NetworkPlan,
    PluginStamp,
    PodMetadata,
    PodRecord,
    PodSpec,
    Route,
    make_container_id,
    make_pod_id,
)


def make_pod(name: str = "web", **fields: Any) -> PodRecord:
    values: dict[str, Any] = {
        "id": make_pod_id(),
        "spec": PodSpec(metadata=PodMetadata(name=name, namespace="shop", uid=f"uid-{name}")),
        "route": Route(runtime="docker", rule="default", reason="nothing else matched", isolation=Isolation.VM),
        "stamp": PluginStamp(name="docker_shim", version="1.0", facts_schema=1),
        "created_at_ns": 1_700_000_000_000_000_000,
        "fingerprint": "f",
    }
    return PodRecord(**(values | fields))


def make_container(pod: PodRecord, name: str = "app", **fields: Any) -> ContainerRecord:
    values: dict[str, Any] = {
        "id": make_container_id(),
        "pod_id": pod.id,
        "spec": ContainerSpec(metadata=ContainerMetadata(name=name), image_ref="busybox"),
        "image_id": "sha256:" + "0" * 64,
        "created_at_ns": 1_700_000_000_000_000_000,
        "fingerprint": "f",
    }
    return ContainerRecord(**(values | fields))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
plain_json = st.dictionaries(st.text(max_size=8), _json, max_size=3)
_plans = st.builds(NetworkPlan, plugin=st.text(max_size=5), netns_path=st.text(max_size=9), content=plain_json)
_attachments = st.builds(Attachment, netns_path=st.text(max_size=9), result=plain_json)
_routes = st.builds(
    Route,
    runtime=st.text(max_size=5),
    rule=st.text(max_size=5),
    reason=st.text(max_size=5),
    isolation=st.sampled_from(Isolation),
    options=plain_json,
)

pods = st.builds(
    PodRecord, route=_routes, facts=plain_json, plan=st.none() | _plans, attachment=st.none() | _attachments
)
containers = st.builds(ContainerRecord, facts=plain_json, spec=st.from_type(ContainerSpec))
