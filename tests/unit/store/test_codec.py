"""What is written is what is read, for every value that a record may hold."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings

from dispatcher.model import ContainerRecord, ContainerSpec, EnvVar, PodRecord
from dispatcher.store.codec import CONTAINER_CODEC, POD_CODEC, UnreadableError
from tests.unit.store.records import containers, make_container, make_pod, pods


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(pods)
def test_a_pod_comes_back_as_it_was(record: PodRecord) -> None:
    assert POD_CODEC.decode(POD_CODEC.encode(record)) == record


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(containers)
def test_a_container_comes_back_as_it_was(record: ContainerRecord) -> None:
    assert CONTAINER_CODEC.decode(CONTAINER_CODEC.encode(record)) == record


def test_types_come_back_too() -> None:
    """Equality alone would take a list for a tuple's neighbour or a word for an enum."""
    pod = make_pod(ips=("10.0.0.1",))
    found = POD_CODEC.decode(POD_CODEC.encode(pod))
    assert type(found.ips) is tuple
    assert type(found.state) is type(pod.state)
    assert type(found.route.isolation) is type(pod.route.isolation)


def test_environment_values_may_be_any_bytes() -> None:
    pod = make_pod()
    spec = ContainerSpec(
        metadata=make_container(pod).spec.metadata, image_ref="x", envs=(EnvVar(key="K", value=bytes(range(256))),)
    )
    record = dataclasses.replace(make_container(pod), spec=spec)
    assert CONTAINER_CODEC.decode(CONTAINER_CODEC.encode(record)).spec.envs[0].value == bytes(range(256))


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b'{"id": 1}', b"\xff\xfe", b'{"id":"x","spec":{}}'])
def test_unreadable_bytes_are_told_apart(body: bytes) -> None:
    with pytest.raises(UnreadableError):
        POD_CODEC.decode(body)


def test_an_unreadable_record_names_the_field() -> None:
    body = POD_CODEC.encode(make_pod()).replace(b'"creating"', b'"dreaming"')
    with pytest.raises(UnreadableError, match=r"^state: "):
        POD_CODEC.decode(body)
