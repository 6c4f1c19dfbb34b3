"""Show which runtime a pod goes to, and why.

For a pod on this node: the decision that was stored when it was made, whatever the policy says now. For a manifest: what
the policy file and the plugins' hooks would decide, rule by rule, without a daemon and without running anything. Ends
with 5 when a pod of the manifest is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dispatcher.commands.config_files import add_config, load
from dispatcher.commands.connection import add_endpoint, add_json, connect, find_pod, parse_info, pod_name
from dispatcher.commands.output import Console, Exit, Failure
from dispatcher.commands.play import read_pods
from dispatcher.commands.status import outline

if TYPE_CHECKING:
    from dispatcher.config import LoadedConfig
    from dispatcher.manifest import PodManifest
    from dispatcher.policy import Explanation
    from dispatcher.policy.matching import Failure as ConditionFailure

EPILOG = """\
examples:
  dispatcher explain web
  dispatcher explain kube-system/proxy -o json
  dispatcher explain -f pod.yaml --policy policy.yaml
"""

_SHOWN = (
    ("state", "state"),
    ("reason", "state_reason"),
    ("message", "message"),
    ("runtime", "runtime"),
    ("isolation", "isolation"),
    ("rule", "rule"),
    ("why", "route_reason"),
    ("policy", "policy_hash"),
    ("decision", "decision_id"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("pod", nargs="?", metavar="POD", help="an id, its beginning, a name or namespace/name")
    parser.add_argument("-f", "--file", metavar="FILE", help="a manifest with Pods, - for standard input")
    parser.add_argument("--policy", metavar="FILE", help="the policy file for -f (default: what --config says)")
    parser.add_argument("--facts", action="store_true", help="of a pod: what its network and its runtime recorded, too")
    add_config(parser)
    add_json(parser)
    add_endpoint(parser)


async def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    if bool(args.pod) == bool(args.file):
        raise Failure("name a pod, or a manifest with -f", code=Exit.USAGE)
    if args.file:
        return _explain_manifest(args, console)
    async with connect(args) as client:
        pod = await find_pod(client, args.pod)
        reply = await client.call("PodSandboxStatus", pod_sandbox_id=pod.id, verbose=True)
    facts = parse_info(reply.info).get("dispatcher")
    if not isinstance(facts, dict):
        raise Failure("this daemon keeps no routes", hint="is it another CRI runtime? see -e")
    if console.as_json:
        console.data({"pod": pod_name(pod.metadata), "id": pod.id, **facts})
        return Exit.OK
    console.fields(
        [("pod", pod_name(pod.metadata)), ("id", pod.id), *((title, facts.get(key)) for title, key in _SHOWN)]
    )
    runtime_facts = facts.get("facts") or {}
    adjusted = [*(facts.get("notes") or ()), *(runtime_facts.get("notes") or ())]
    shown = [("votes of hooks", facts.get("votes")), ("adjusted", adjusted)]
    if args.facts:
        shown += [("network", facts.get("attachment")), ("facts of the runtime", runtime_facts)]
    for title, value in shown:
        if value:
            console.line(f"{title}:")
            for line in outline(value):
                console.line(f"  {line}")
    return Exit.OK


def _explain_manifest(args: argparse.Namespace, console: Console) -> int:
    """Decide the pods of a manifest offline."""
    manifests = read_pods(args.file)
    loaded = load(args.config)
    explanations = explain_pods(manifests, loaded, Path(args.policy) if args.policy else loaded.config.policy)
    if console.as_json:
        console.data([explanation.as_dict() for explanation in explanations])
    else:
        for index, explanation in enumerate(explanations):
            if index:
                console.line()
            _show(explanation, console)
    return Exit.REFUSED if any(explanation.is_refused for explanation in explanations) else Exit.OK


def explain_pods(manifests: Sequence[PodManifest], loaded: LoadedConfig, policy_file: Path) -> list[Explanation]:
    """Return how each pod would be decided, hooks included. Raises Failure for a policy that cannot be loaded."""
    from dispatcher.commands.offline import load_offline
    from dispatcher.commands.sessions import read_node
    from dispatcher.cri import validate
    from dispatcher.errors import InvalidRequest
    from dispatcher.manifest import Placement, run_request
    from dispatcher.policy import explain, facts_of_pod
    from dispatcher.yaml_marks import YamlError

    node = read_node()
    explanations = []
    with load_offline(loaded) as offline:
        try:
            policy = offline.load_policy(policy_file).policy
        except YamlError as error:
            raise Failure(str(error), hint="mend the policy file, or name another with --policy") from error
        for manifest in manifests:
            uid = manifest.pod.metadata.uid or "explained"
            request = run_request(manifest, Placement(uid=uid, pod_dir="/nowhere"), node)
            try:
                spec = validate.pod_spec(request.config, request.runtime_handler)
            except InvalidRequest as error:
                raise Failure(f"pod {manifest.pod.metadata.name}: {error.message}") from error
            explanations.append(explain(policy, facts_of_pod(spec), offline.registry.vote(spec)))
    return explanations


def _show(explanation: Explanation, console: Console) -> None:
    runtime = "refused" if explanation.is_refused else explanation.runtime
    if not explanation.is_refused and not explanation.is_loaded:
        runtime += " (not loaded: such a pod cannot be run here)"
    console.fields(
        [
            ("pod", f"{explanation.namespace}/{explanation.name}"),
            ("runtime", runtime),
            ("isolation", explanation.isolation),
            ("rule", explanation.rule),
            ("why", explanation.reason),
            ("handler", explanation.handler),
            ("floor", explanation.floor),
            ("trusted", "yes, labels and annotations may lower isolation" if explanation.is_trusted else "no"),
            ("options", ", ".join(f"{key}={value}" for key, value in explanation.options.items())),
            ("policy", explanation.policy_hash),
        ]
    )
    if explanation.votes:
        console.table(
            ("HOOK OF", "VOTES FOR", "COUNTED", "BECAUSE"),
            [(v["plugin"], v["runtime"], "yes" if v["counted"] else "no", v["reason"]) for v in explanation.votes],
        )
    if explanation.rules:
        console.table(
            ("RULE", "LEADS TO", "OUTCOME", "BECAUSE"),
            [
                (rule.rule, rule.leads_to, rule.outcome, rule.note or "; ".join(map(_because, rule.failures)))
                for rule in explanation.rules
            ],
        )
    if explanation.container_rules:
        console.line(f"its containers are held against: {', '.join(explanation.container_rules)}")


def _because(failure: ConditionFailure) -> str:
    return f"{failure.matcher} is {failure.found}, not {failure.wanted}"
