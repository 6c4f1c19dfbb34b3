"""The network provider: plans, attaches and detaches pods by CNI plugins.

It orchestrates and decides nothing that a value could decide: the folders are `catalogue.py`'s, the chain is
`chain.py`'s, what a pod may ask for is `capabilities.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispatcher.api import NetworkStatus, Services, find_namespace_inode
from dispatcher.errors import NetworkFailed, NetworkNotReady, NotFound
from dispatcher.model import Attachment, NetworkPlan, PodId, PodSpec
from dispatcher_cni.arguments import make_arguments
from dispatcher_cni.capabilities import make_capabilities, parse_pod_cidrs
from dispatcher_cni.catalogue import Catalogue
from dispatcher_cni.chain import Chain
from dispatcher_cni.config import CniConfig
from dispatcher_cni.conflist import NetworkConfig
from dispatcher_cni.default_network import make_default_network
from dispatcher_cni.gate import Gate
from dispatcher_cni.journal import Journal, PluginLock
from dispatcher_cni.namespace import read_facts, read_routes
from dispatcher_cni.plan import PROVIDER, AttachmentPlan
from dispatcher_cni.readiness import NOT_LOOKED, examine, find_missing, no_network
from dispatcher_cni.result import NamespaceFacts, make_attachment
from dispatcher_cni.runner import PluginRunner

_LOG = logging.getLogger(__name__)
_FIRST_LOOK_S = 10.0


class CniNetwork:
    """NetworkProvider by CNI. See `dispatcher.api.NetworkProvider` for the contract of each method."""

    def __init__(self, config: CniConfig, services: Services) -> None:
        self._config = config
        self._catalogue = Catalogue(config.conf_dirs)
        self._runner = PluginRunner(config, services.observe)
        self._journal = Journal(folder=services.state_dir / "attachments", lock_folder=services.run_dir / "locks")
        self._chain = Chain(self._runner, self._journal, skip_missing_on_delete=config.skip_missing_plugins_on_delete)
        self._notify = services.notify
        self._rules = config.annotations.to_rules()
        self._pod_cidrs: tuple[str, ...] = ()
        self._network: NetworkConfig | None = None
        self._status = NOT_LOOKED
        self._gate = Gate()
        self._attached_here: dict[str, AttachmentPlan] = {}  # by this process, and so not garbage whatever a list says
        self._watching: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The provider's name."""
        return PROVIDER

    async def start(self) -> None:
        """Read the configuration, ask the plugins once, and go on watching. Returns with a status that is true."""
        self.open_journal()
        self._look()
        with contextlib.suppress(TimeoutError):  # a plugin that hangs must not keep the daemon from serving
            async with asyncio.timeout(_FIRST_LOOK_S):
                await self._examine()
        self._watching = asyncio.create_task(self._watch(), name="cni-watch")

    def open_journal(self) -> None:
        """Make the provider usable without watching: for commands that act on one pod. Idempotent."""
        self._journal.open()

    async def aclose(self) -> None:
        """Stop watching. Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
            self._watching = None

    def status(self) -> NetworkStatus:
        """Answer from memory."""
        return self._status

    def set_pod_cidr(self, cidr: str) -> None:
        """Take the node's pod ranges, for plugins with the capability ipRanges. Nonsense is logged and ignored."""
        try:
            self._pod_cidrs = parse_pod_cidrs(cidr)
        except ValueError as error:
            _LOG.warning("The node's pod range %r is ignored: %s.", cidr, error)
            return
        self._look()

    # -------------------------------------------------------------------------------------------- which network
    def _look(self) -> bool:
        """Look at the folders and choose the network. Returns whether another one, or other problems, were found."""
        changed = self._catalogue.refresh()
        network = self._catalogue.network
        if network is None and not self._catalogue.problems and self._config.default_network.allow:
            network = make_default_network(self._config.default_network, self._pod_cidrs)
        if not changed and network == self._network:
            return False
        self._network = network
        for problem in self._catalogue.problems:
            _LOG.warning("Network configuration: %s", problem)
        if network is None:
            self._set_status(no_network(self._config, self._catalogue.problems))
        else:
            _LOG.info("Pods get the network %s (%s).", network.name, network.source)
        return True

    async def _examine(self) -> None:
        network = self._network
        if network is None:
            self._set_status(no_network(self._config, self._catalogue.problems))
            return
        status = await examine(
            network, config=self._config, runner=self._runner, chain=self._chain, routes=read_routes()
        )
        if self._catalogue.problems:
            status = replace(status, message=" ".join((status.message, *self._catalogue.problems)))
        if network is self._network:  # else another one was chosen meanwhile, and will be examined next
            self._set_status(status)

    def _set_status(self, status: NetworkStatus) -> None:
        if status == self._status:
            return
        self._status = status
        if not status.ready:
            _LOG.warning("The network is not ready (%s): %s", status.reason, status.message)
            self._notify(status.reason, status.message)
        elif self._catalogue.problems:
            self._notify("BadNetworkConfig", " ".join(self._catalogue.problems))
        else:
            self._notify("", "")  # takes back what was said before

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        examined = loop.time()
        while True:
            await asyncio.sleep(self._config.rescan_s)
            try:
                if self._look() or loop.time() - examined >= self._config.status_s or not self._status.ready:
                    await self._examine()
                    examined = loop.time()
            except Exception:  # a fault of ours must not end the watch  # noqa: BLE001
                _LOG.exception("Watching the network configuration failed; it goes on.")

    # -------------------------------------------------------------------------------------------------- one pod
    def plan(self, pod_id: PodId, pod: PodSpec, netns_path: str) -> NetworkPlan:
        """Decide all that ADD will run with. Looks at the folders, so that a change a moment ago counts."""
        self._look()
        network = self._network
        if network is None:
            raise NetworkNotReady(self._status.message)
        fault = find_missing(network, self._runner)
        if fault is not None:
            raise NetworkNotReady(fault.message)
        if not self._status.ready and self._status.reason in {"SubnetCollision", "ToolMissing"}:
            raise NetworkNotReady(self._status.message)
        capabilities = make_capabilities(
            pod, rules=self._rules, pod_cidrs=self._pod_cidrs, declared=network.capabilities
        )
        if capabilities.unheard:
            _LOG.warning(
                "Pod %s asks for %s, which no plugin of the network %s takes.",
                pod_id,
                ", ".join(capabilities.unheard),
                network.name,
            )
        plan = AttachmentPlan(
            container_id=str(pod_id),
            interface=self._config.interface,
            netns_path=netns_path,
            network=network,
            arguments=make_arguments(pod_id, pod),
            capabilities=capabilities.arguments,
            bin_dirs=self._runner.bin_dirs,
        )
        return plan.to_network_plan()

    async def add(self, plan: NetworkPlan) -> Attachment:
        """Attach."""
        attachment = AttachmentPlan.from_network_plan(plan)
        if find_namespace_inode(Path(plan.netns_path)) is None:
            raise NetworkFailed(f"There is no network namespace at {plan.netns_path} to attach.")
        async with self._alone(attachment.container_id) as lock:
            self._attached_here[attachment.container_id] = attachment
            result = await self._chain.add(attachment, lock)
            return await self._describe(attachment, result)

    async def _describe(self, plan: AttachmentPlan, result: Mapping[str, Any]) -> Attachment:
        try:
            facts = await read_facts(Path(plan.netns_path))
        except (NotFound, OSError) as error:
            _LOG.warning("The namespace of pod %s cannot be read: %s.", plan.container_id, error)
            facts = NamespaceFacts()
        return make_attachment(result, netns_path=plan.netns_path, interface=plan.interface, facts=facts)

    async def check(self, plan: NetworkPlan, attachment: Attachment) -> tuple[str, ...]:
        """Return what the plugins find wrong."""
        attached = AttachmentPlan.from_network_plan(plan)
        async with self._gate.shared(attached.container_id):
            return await self._chain.check(attached, attachment.result)

    async def delete(self, plan: NetworkPlan, attachment: Attachment | None) -> None:
        """Detach. Without an attachment the journal's newest result serves, if a plugin got as far as one."""
        attached = AttachmentPlan.from_network_plan(plan)
        async with self._alone(attached.container_id) as lock:
            await self._delete(attached, attachment.result if attachment is not None else None, lock)

    async def _delete(self, plan: AttachmentPlan, result: Mapping[str, Any] | None, lock: PluginLock) -> None:
        entry = self._journal.find(plan.container_id)
        if not result and entry is not None:
            result = entry.result
        await self._chain.delete(plan, result or None, lock, was_attached=entry is not None)
        self._journal.remove(plan.container_id)
        self._attached_here.pop(plan.container_id, None)

    @contextlib.asynccontextmanager
    async def _alone(self, container_id: str) -> AsyncIterator[PluginLock]:
        """Be the only one at work on this attachment, in this process and among plugins of a former daemon."""
        async with (
            self._gate.shared(container_id),
            self._journal.hold(container_id, patience_s=self._config.stray_patience_s) as lock,
        ):
            yield lock

    # ------------------------------------------------------------------------------------------------- clean-up
    async def gc(self, plans: tuple[NetworkPlan, ...]) -> None:
        """Free what belongs to no plan: DEL for attachments on file without one, then GC where plugins have it."""
        valid = [AttachmentPlan.from_network_plan(plan) for plan in plans if plan.plugin == PROVIDER]
        on_record = {plan.container_id for plan in valid}
        for container_id in self._journal.ids():
            if container_id in on_record or container_id in self._attached_here:
                continue
            try:
                async with self._alone(container_id) as lock:
                    if self._journal.holds(container_id):
                        await self._delete_forgotten(container_id, lock)
                        _LOG.info("Detached pod %s, which is not on record any more.", container_id)
            except (NetworkFailed, OSError) as error:
                _LOG.warning("Pod %s, which is not on record any more, stays attached: %s", container_id, error)
        if self._config.collect_garbage:
            await self._collect([*valid, *self._attached_here.values()])

    async def _delete_forgotten(self, container_id: str, lock: PluginLock) -> None:
        entry = self._journal.find(container_id)
        if entry is not None:
            await self._delete(entry.plan, entry.result, lock)
        elif self._network is not None:
            # The machine died while the file was written. The id alone frees the addresses that outlived it.
            plan = AttachmentPlan(
                container_id=container_id,
                interface=self._config.interface,
                netns_path="",
                network=self._network,
                arguments=(("IgnoreUnknown", "1"),),
                capabilities={},
                bin_dirs=self._runner.bin_dirs,
            )
            await self._delete(plan, None, lock)

    async def _collect(self, valid: list[AttachmentPlan]) -> None:
        networks: dict[str, NetworkConfig] = {plan.network.name: plan.network for plan in valid}
        if self._network is not None:
            networks[self._network.name] = self._network
        async with self._gate.exclusive():
            for name, network in networks.items():
                pairs = sorted({(plan.container_id, plan.interface) for plan in valid if plan.network.name == name})
                for complaint in await self._chain.collect_garbage(network, pairs):
                    _LOG.warning("%s", complaint)
