"""One guest and one driver for the session, so that one template serves all tests here."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dispatcher_hyper_vm.drivers import GuestImage, LaunchSpec, NicSpec, RunningVm, SizeClass, TemplateScope, VmSpec
from dispatcher_hyper_vm.drivers.qemu import QemuConfig, QemuVmm
from dispatcher_hyper_vm.templates import TemplateLimits
from dispatcher_vm_kit.leaf import find_leaf
from dispatcher_vm_kit.share import remove_share
from tests.hyper_vm.driver.mini_guest import Gate, make_guest
from tests.lab.child import PartMissingError, lab_folder, require_root
from tests.lab.wire import Wire, make_wire

_COUNT = itertools.count()
Start = Callable[..., Awaitable[RunningVm]]


def new_id() -> str:
    """A machine's id that no other test has."""
    return hashlib.sha256(f"{os.getpid()} {next(_COUNT)}".encode()).hexdigest()


@pytest.fixture(scope="session")
def vm_folder() -> Iterator[Path]:
    """The session's folder, with a short path."""
    try:
        require_root()
    except PartMissingError as exc:
        pytest.skip(str(exc))
    path = lab_folder("vm")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def guest(vm_folder: Path) -> GuestImage:
    """A guest whose init runs lines of shell."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    folder = vm_folder / "guest"
    folder.mkdir()
    try:
        return make_guest(folder)
    except PartMissingError as exc:
        pytest.skip(str(exc))


def make_config(folder: Path, **changes: Any) -> QemuConfig:
    """As a node has it, but patient: the machine of the tests may be busy."""
    limits = TemplateLimits(build_s=400, wait_s=400)
    return replace(
        QemuConfig(run_folder=folder / "run", state_folder=folder / "state", start_s=120, templates=limits), **changes
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vmm(vm_folder: Path, guest: GuestImage) -> AsyncIterator[QemuVmm]:
    """The session's driver."""
    made = QemuVmm(make_config(vm_folder), Gate())
    health = await made.probe()
    assert health.ready, health.message
    yield made
    for machine_id in made.machine_ids():
        await made.remove(machine_id)
    await made.aclose()
    await made.recover()


@pytest.fixture
def make_spec(vm_folder: Path, guest: GuestImage) -> Iterator[Callable[..., VmSpec]]:
    """A machine to be, with all that a pod's machine has but the network. Its shared folder goes with the test."""
    shares: list[Path] = []

    def make(**changes: Any) -> VmSpec:
        machine_id = new_id()
        spec = VmSpec(
            id=machine_id,
            guest=guest,
            size=SizeClass(memory_bytes=1 << 30, vcpus=2),
            nics=(NicSpec(tap_fd=-1),),
            share=vm_folder / f"share-{machine_id[:8]}",
            launch=LaunchSpec(leaf=find_leaf("", machine_id)),
            templates=TemplateScope(),
        )
        shares.extend([spec.share] if spec.share is not None else [])
        return replace(spec, **changes)

    yield make
    for share in shares:
        remove_share(share)


@pytest_asyncio.fixture(loop_scope="session")
async def start(vmm: QemuVmm, make_spec: Callable[..., VmSpec]) -> AsyncIterator[Start]:
    """Start a machine; the test's machines go with it."""
    specs: list[VmSpec] = []

    async def begin(spec: VmSpec | None = None, **changes: Any) -> RunningVm:
        wanted = spec or make_spec(**changes)
        specs.append(wanted)
        return await vmm.start(wanted)

    yield begin
    for spec in specs:
        await vmm.remove(spec.id, leaf=spec.launch.leaf)


@pytest_asyncio.fixture(loop_scope="session")
async def wire(vm_folder: Path) -> AsyncIterator[Wire]:
    """A pod's namespace, as a network plugin leaves it."""
    async with make_wire(vm_folder / "ns") as made:
        yield made
