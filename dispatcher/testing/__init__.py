"""For plugin authors: fakes that behave, and the contract that a runtime has to keep.

    pytest --pyargs dispatcher.testing --runtime=NAME

runs the contract suite against a runtime. NAME is "fake", the name of an entry point in the group
`dispatcher.testing.cases`, or `module:attribute`; what it names is a function that takes a folder and yields a
`RuntimeCase` (an async generator function). A test suite of its own may instead define a fixture `case` and
`from dispatcher.testing.contract import *`.

Nothing here is imported by the daemon. pytest is needed for the contract only: install `cri-dispatcher[testing]`.
"""

from dispatcher.testing.case import FakeCase, RuntimeCase, fake_case
from dispatcher.testing.fake_engine import FakeEngine, FakeProcess, Fault
from dispatcher.testing.fake_providers import (
    BUSYBOX,
    FakeImages,
    FakeNetwork,
    FakeSizer,
    FakeStreaming,
)
from dispatcher.testing.fake_runtime import ABILITIES, USUAL, FakeRuntime, make_runtime
from dispatcher.testing.plugin import FakePlugin

__all__ = [
    "ABILITIES",
    "BUSYBOX",
    "USUAL",
    "FakeCase",
    "FakeEngine",
    "FakeImages",
    "FakeNetwork",
    "FakePlugin",
    "FakeProcess",
    "FakeRuntime",
    "FakeSizer",
    "FakeStreaming",
    "Fault",
    "RuntimeCase",
    "fake_case",
    "make_runtime",
]
