"""Session fixtures that start the real parts. A part that this machine lacks skips the test, with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.child import PartMissingError
from tests.lab.engine import Engine
from tests.lab.images import TestImages
from tests.lab.node import Node
from tests.lab.registry import Registry
from tests.lab.sweep import sweep_stale


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The session's private Docker Engine, running. A test that stops or kills it starts it again."""
    sweep_stale()
    try:
        engine = Engine()
    except PartMissingError as exc:
        pytest.skip(str(exc))
    try:
        engine.start()
        print(engine.describe())
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    """The session's registry: plain HTTP, no credentials."""
    try:
        registry = Registry(port=int(os.environ.get("DISPATCHER_LAB_REGISTRY_PORT", "0")))
    except PartMissingError as exc:
        pytest.skip(str(exc))
    try:
        registry.start()
        yield registry
    finally:
        registry.close()


@pytest.fixture(scope="session")
def test_images(registry: Registry) -> TestImages:
    """The offline images, pushed to the session's registry."""
    images = TestImages(registry)
    try:
        images.push_all()
    except PartMissingError as exc:
        pytest.skip(str(exc))
    return images


@pytest.fixture(scope="session")
def node(engine: Engine, registry: Registry) -> Iterator[Callable[..., Node]]:
    """A factory of running nodes: `node(config=..., policy=..., default_runtime=..., env=...)`, ready for pods.

    Nodes live until the session ends, unless the test closes its own earlier.
    """
    nodes: list[Node] = []

    def make(*, wait_ready: bool = True, **options: Any) -> Node:
        try:
            made = Node(engine=engine, registry=registry, **options)
        except PartMissingError as exc:
            pytest.skip(str(exc))
        nodes.append(made)
        made.start()
        if wait_ready:
            made.client().wait_ready()
        return made

    yield make
    for made in nodes:
        made.close()
