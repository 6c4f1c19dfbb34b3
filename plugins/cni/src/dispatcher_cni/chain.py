"""The commands of CNI over a whole chain of plugins, as libcni has them, and where we differ, why.

ADD runs the plugins in order and hands each the result of the one before. DEL runs them in reverse with the final
result. Both run with the plan alone. What is not done here: locks, choosing a network, retries.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dispatcher.api import find_namespace_inode, remove_namespace
from dispatcher.errors import NetworkFailed
from dispatcher_cni.conflist import NetworkConfig, ipam_type
from dispatcher_cni.errors import UNKNOWN_CONTAINER, PluginFailed, PluginMissing
from dispatcher_cni.journal import Journal, PluginLock
from dispatcher_cni.namespace import restore_interface
from dispatcher_cni.plan import AttachmentPlan
from dispatcher_cni.request import make_gc_input, make_input
from dispatcher_cni.result import PluginError, make_attachment, parse_success
from dispatcher_cni.runner import PluginRunner
from dispatcher_cni.versions import at_least

_LOG = logging.getLogger(__name__)
_CHECK_SINCE = "0.4.0"  # the version that brought CHECK, and the result as a part of DEL
_STATUS_SINCE = "1.1.0"  # the version that brought STATUS and GC
# Plugins that read the pod's interface at DEL to know which rules they made.
_READS_INTERFACE = frozenset({"bridge", "ptp"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _DelCall:
    """What DEL of one plugin runs with.

    `netns_path` is "" where the namespace is gone. `restored` says that the interface or its addresses were put back.
    """

    plan: AttachmentPlan
    plugin: Mapping[str, Any]
    result: Mapping[str, Any] | None
    netns_path: str
    lock: PluginLock
    restored: bool


class Chain:
    """Runs chains. One attachment is the business of one call at a time; the caller sees to that."""

    def __init__(self, runner: PluginRunner, journal: Journal, *, skip_missing_on_delete: bool) -> None:
        self._runner = runner
        self._journal = journal
        self._skip_missing = skip_missing_on_delete

    async def add(self, plan: AttachmentPlan, lock: PluginLock) -> Mapping[str, Any]:
        """Run ADD and return the last result. Each result is on file before the next plugin begins.

        Raises:
            NetworkFailed: a plugin failed; those before it have run.
        """
        result: Mapping[str, Any] | None = None
        self._journal.write(plan, None)
        for plugin in plan.network.plugins:
            name = plugin["type"]
            stdin = make_input(plan.network, plugin, capabilities=plan.capabilities, previous=result)
            stdout = await self._runner.call("ADD", name, stdin=stdin, plan=plan, inherited_fd=lock.for_next_plugin())
            try:
                result = parse_success(stdout, cni_version=plan.network.cni_version)
            except ValueError as error:
                text = f"its answer is not a result ({str(error)[:200]})"
                raise PluginFailed(name, "ADD", PluginError(code=0, text=text)) from error
            self._journal.write(plan, result)
        if result is None:
            raise NetworkFailed(f"The network {plan.network.name} has no plugins.")
        return result

    async def check(self, plan: AttachmentPlan, result: Mapping[str, Any]) -> tuple[str, ...]:
        """Run CHECK on every plugin and return their complaints.

        One plugin's complaint does not keep the others from being asked: some report what is not wrong (portmap 1.1
        misses IPv6 rules on pods without IPv6), so nothing may depend on the answer.
        """
        network = plan.network
        if network.disable_check or not at_least(network.cni_version, _CHECK_SINCE):
            return ()
        complaints = []
        for plugin in network.plugins:
            stdin = make_input(network, plugin, capabilities=plan.capabilities, previous=result)
            try:
                await self._runner.call("CHECK", plugin["type"], stdin=stdin, plan=plan)
            except NetworkFailed as error:
                complaints.append(error.message)
        return tuple(complaints)

    async def delete(
        self, plan: AttachmentPlan, result: Mapping[str, Any] | None, lock: PluginLock, *, was_attached: bool
    ) -> None:
        """Run DEL over the chain. Idempotent.

        A plugin that fails stops it, as in libcni: what stands before it, the address above all, stays reserved until
        DEL is called again. A plugin that is not there any more does not stop it; its addresses are freed by asking
        its IPAM plugin directly, and at the end it is an error unless the operator said to skip it. `was_attached`:
        no DEL has succeeded yet.

        Raises:
            NetworkFailed: something may still be attached.
        """
        path = Path(plan.netns_path)
        had_namespace = find_namespace_inode(path) is not None
        restored = await self._restore(plan, result, may_make=was_attached)
        has_namespace = find_namespace_inode(path) is not None
        missing: list[PluginMissing] = []
        try:
            for plugin in reversed(plan.network.plugins):
                call = _DelCall(
                    plan=plan,
                    plugin=plugin,
                    result=result,
                    netns_path=plan.netns_path if has_namespace else "",
                    lock=lock,
                    restored=restored,
                )
                try:
                    await self._delete_one(call)
                except PluginMissing as error:
                    missing.append(error)
                    missing += await self._free_addresses(call)
        finally:
            if has_namespace and not had_namespace:
                await remove_namespace(path)
        for absent in missing:
            if not self._skip_missing:
                raise absent
            _LOG.warning("DEL of pod %s went on without a plugin. %s", plan.container_id, absent.message)

    async def _delete_one(self, call: _DelCall) -> None:
        previous = call.result if at_least(call.plan.network.cni_version, _CHECK_SINCE) else None
        try:
            await self._delete_by(call.plugin["type"], call, previous)
        except PluginFailed as error:
            if call.restored and call.plugin["type"] in _READS_INTERFACE:
                # An earlier DEL got to the end, and the rules that the interface was put back for are gone: the
                # reference plugins fail then, behind the removal of the interface. As libcni would have it from here.
                _LOG.info(
                    "DEL of pod %s is tried again without its interface. %s", call.plan.container_id, error.message
                )
                await self._delete_one(replace(call, restored=False))
                return
            # CNI has no code for "the namespace that you need is gone"; containerd, too, knows it by these words.
            gone = not call.netns_path and "no such file or directory" in error.error.text
            if error.error.code != UNKNOWN_CONTAINER and not gone:
                raise
            _LOG.warning("DEL of pod %s found nothing to do. %s", call.plan.container_id, error.message)
            await self._free_addresses(call)

    async def _free_addresses(self, call: _DelCall) -> list[PluginMissing]:
        """Do for an absent plugin what it would have done: DEL of its IPAM plugin, with the same request.

        Returns what is missing for that, too.
        """
        name = ipam_type(call.plugin)
        try:
            if name:
                await self._delete_by(name, call, call.result)
        except PluginMissing as error:
            return [error]
        return []

    async def _delete_by(self, name: str, call: _DelCall, previous: Mapping[str, Any] | None) -> None:
        plan = call.plan
        stdin = make_input(plan.network, call.plugin, capabilities=plan.capabilities, previous=previous)
        await self._runner.call(
            "DEL", name, stdin=stdin, plan=plan, netns_path=call.netns_path, inherited_fd=call.lock.for_next_plugin()
        )

    async def _restore(self, plan: AttachmentPlan, result: Mapping[str, Any] | None, *, may_make: bool) -> bool:
        """See to it that DEL meets the namespace as ADD left it. Returns whether something had to be put back."""
        if result is None:
            return False
        try:
            interfaces = make_attachment(result, netns_path=plan.netns_path, interface=plan.interface).interfaces
        except NetworkFailed:
            _LOG.warning("The stored result of pod %s cannot be read; DEL runs all the same.", plan.container_id)
            return False
        path = Path(plan.netns_path)
        addresses = next((entry.addresses for entry in interfaces if entry.name == plan.interface), ())
        may_make = may_make and any(
            plugin["type"] in _READS_INTERFACE and plugin.get("ipMasq") for plugin in plan.network.plugins
        )
        if not addresses or not (may_make or find_namespace_inode(path) is not None):
            return False
        return await restore_interface(path, interface=plan.interface, addresses=addresses, may_make=may_make)

    async def collect_garbage(self, network: NetworkConfig, valid: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        """Run GC where the network and the plugin speak it. Returns complaints; every plugin is asked."""
        if network.disable_gc or not at_least(network.cni_version, _STATUS_SINCE):
            return ()
        complaints = []
        for plugin in network.plugins:
            try:
                if await self._runner.speaks(plugin["type"], _STATUS_SINCE):
                    stdin = make_gc_input(network, plugin, valid)
                    await self._runner.call("GC", plugin["type"], stdin=stdin)
            except NetworkFailed as error:
                complaints.append(error.message)
        return tuple(complaints)

    async def status(self, network: NetworkConfig) -> PluginFailed | None:
        """Run STATUS where the network and the plugin speak it. Returns the first refusal, None when all are ready.

        Raises:
            PluginMissing: a plugin is not there.
        """
        if not at_least(network.cni_version, _STATUS_SINCE):
            return None
        for plugin in network.plugins:
            try:
                if await self._runner.speaks(plugin["type"], _STATUS_SINCE):
                    await self._runner.call("STATUS", plugin["type"], stdin=make_input(network, plugin))
            except PluginFailed as error:
                return error
        return None
