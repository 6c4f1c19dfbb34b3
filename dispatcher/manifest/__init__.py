"""A Kubernetes manifest as the kubelet would send it to us: for `dispatcher play`, `explain` and tests.

pods = read_manifest(text, "pod.yaml")                              # or YamlError with every problem
request = run_request(pods[0], placement, node)                     # RunPodSandbox
write_volumes(plan_volumes(pods[0], placement.pod_dir))
for kind, container in pods[0].containers:                          # in the order in which they start
    write_volumes(plan_container_files(pods[0], container, placement.pod_dir, attempt))
    config = container_config(pods[0], container, placement, node, image=image, pod_ips=ips, attempt=attempt)
"""

from dispatcher.manifest.convert import (
    Node,
    Placement,
    container_config,
    default_log_dir,
    parse_resolv_conf,
    pull_policy,
    run_request,
    sandbox_config,
)
from dispatcher.manifest.pods import ContainerKind, PodManifest
from dispatcher.manifest.read import read_manifest
from dispatcher.manifest.volumes import VolumePlan, plan_container_files, plan_volumes, remove_pod_dir, write_volumes

__all__ = [
    "ContainerKind",
    "Node",
    "Placement",
    "PodManifest",
    "VolumePlan",
    "container_config",
    "default_log_dir",
    "parse_resolv_conf",
    "plan_container_files",
    "plan_volumes",
    "pull_policy",
    "read_manifest",
    "remove_pod_dir",
    "run_request",
    "sandbox_config",
    "write_volumes",
]
