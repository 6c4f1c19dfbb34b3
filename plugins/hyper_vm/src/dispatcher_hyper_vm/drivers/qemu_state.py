"""A machine's device state, into it and out of it, through its monitor. Its memory stays where it is: in a shared file."""

from __future__ import annotations

import asyncio
import fcntl
import os

from dispatcher.api import effect
from dispatcher_hyper_vm.templates import TemplateRefused
from dispatcher_vm_kit.qmp_client import Qmp

_IGNORE_SHARED = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
_STATE_BYTES = 64 << 20  # more than any device state
_PIPE_BYTES = 1 << 20
_SET_PIPE_SIZE = 1031


@effect("hyper_vm.give_state")
async def give_state(qmp: Qmp, state: bytes, *, timeout_s: float) -> None:
    """Restore a device state into a machine that waits for one. Its memory is in place already."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            await qmp.execute("migrate-set-capabilities", _IGNORE_SHARED)
            await qmp.give_fd(reader, "state")
        finally:
            os.close(reader)
        await qmp.execute("migrate-incoming", {"uri": "fd:state"})
        await _fill(writer, state)
    finally:
        os.close(writer)
    await qmp.wait_migrated(timeout_s=timeout_s)


async def _fill(writer: int, state: bytes) -> None:
    """Write it all; usually it fits into the pipe at once."""
    room = fcntl.fcntl(writer, _SET_PIPE_SIZE, _PIPE_BYTES)
    if len(state) <= room:
        os.write(writer, state)
        return
    view = memoryview(state)
    while view:
        written = await asyncio.to_thread(os.write, writer, view[:room])
        view = view[written:]


@effect("hyper_vm.take_state")
async def take_state(qmp: Qmp, *, timeout_s: float) -> bytes:
    """The device state of a halted machine, without its memory."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            await qmp.execute("migrate-set-capabilities", _IGNORE_SHARED)
            await qmp.give_fd(writer, "state")
        finally:
            os.close(writer)
        reading = asyncio.ensure_future(asyncio.to_thread(_read_all, reader))
        await qmp.execute("migrate", {"uri": "fd:state"})
        await qmp.wait_migrated(timeout_s=timeout_s)
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(reading)
    finally:
        os.close(reader)


def _read_all(reader: int) -> bytes:
    found = bytearray()
    while chunk := os.read(reader, _PIPE_BYTES):
        found += chunk
        if len(found) > _STATE_BYTES:
            raise TemplateRefused("the machine's device state has no end")
    return bytes(found)
