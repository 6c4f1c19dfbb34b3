"""Which test of this suite stands for which conformance spec of cri-tools, or why none does.

Spec names are those of the validation suite: its parts, joined by " > ". critest_specs.txt lists what exists. A spec
that is missing here, a name that is no spec, and a test that does not exist each fail test_critest_map.py.
"""

from __future__ import annotations

from typing import Final

NO_NRI: Final = "NRI plugins are not offered: plugins of the dispatcher take part in decisions through its own hooks"
NO_APPARMOR: Final = "needs a host with AppArmor and a profile loaded into its kernel"

MAP: Final[dict[str, tuple[str, ...] | str]] = {
    "AppArmor > runtime should prefer new apparmor field > should enforce a apparmor_profile blocking writes": NO_APPARMOR,
    "AppArmor > runtime should prefer new apparmor field > should fail with an unloaded apparmor_profile": (
        "test_seccomp.py::test_apparmor_profiles_are_refused_where_the_host_has_none",
    ),
    "AppArmor > runtime should prefer new apparmor field > should work with apparmor profile": NO_APPARMOR,
    "AppArmor > runtime should support apparmor field > should enforce a apparmor_profile blocking writes": NO_APPARMOR,
    "AppArmor > runtime should support apparmor field > should enforce a permissive deprecated profile": NO_APPARMOR,
    "AppArmor > runtime should support apparmor field > should fail with an unloaded apparmor_profile": (
        "test_seccomp.py::test_apparmor_profiles_are_refused_where_the_host_has_none",
    ),
    "AppArmor > runtime should support deprecated apparmor_profile field > should enforce a apparmor_profile blocking writes": NO_APPARMOR,
    "AppArmor > runtime should support deprecated apparmor_profile field > should enforce a permissive deprecated profile": NO_APPARMOR,
    "AppArmor > runtime should support deprecated apparmor_profile field > should fail with an unloaded apparmor_profile": (
        "test_seccomp.py::test_apparmor_profiles_are_refused_where_the_host_has_none",
    ),
    "Container > runtime should support adding volume and device > runtime should support starting container with volume": (
        "test_container.py::test_a_host_folder_is_seen_where_it_is_mounted",
    ),
    "Container > runtime should support adding volume and device > runtime should support starting container with volume when host path is a symlink": (
        "test_container.py::test_a_host_folder_is_seen_where_it_is_mounted",
    ),
    "Container > runtime should support basic operations on container > runtime should support creating container": (
        "test_container.py::test_a_created_container_is_listed_and_not_started",
    ),
    "Container > runtime should support basic operations on container > runtime should support execSync": (
        "test_container.py::test_exec_brings_output_and_code",
    ),
    "Container > runtime should support basic operations on container > runtime should support execSync with timeout": (
        "test_container.py::test_exec_past_its_timeout_is_killed_and_says_so",
    ),
    "Container > runtime should support basic operations on container > runtime should support listing container stats": (
        "test_container.py::test_stats_of_one_container_are_complete",
    ),
    "Container > runtime should support basic operations on container > runtime should support listing stats for containers filtered by labels": (
        "test_container.py::test_stats_are_listed_by_label",
    ),
    "Container > runtime should support basic operations on container > runtime should support listing stats for started containers": (
        "test_container.py::test_stats_are_listed_by_id_and_by_pod",
    ),
    "Container > runtime should support basic operations on container > runtime should support listing stats for started containers when filter is nil": (
        "test_container.py::test_stats_without_a_filter_list_all_running_containers",
    ),
    "Container > runtime should support basic operations on container > runtime should support listing stats for three created containers when filter is nil.": (
        "test_container.py::test_stats_without_a_filter_list_all_running_containers",
    ),
    "Container > runtime should support basic operations on container > runtime should support preserving container attributes": (
        "test_container.py::test_metadata_labels_and_annotations_are_kept_as_they_came",
    ),
    "Container > runtime should support basic operations on container > runtime should support removing created container": (
        "test_container.py::test_a_container_is_removed_in_any_state",
    ),
    "Container > runtime should support basic operations on container > runtime should support removing running container": (
        "test_container.py::test_a_container_is_removed_in_any_state",
    ),
    "Container > runtime should support basic operations on container > runtime should support removing stopped container": (
        "test_container.py::test_a_container_is_removed_in_any_state",
    ),
    "Container > runtime should support basic operations on container > runtime should support starting container": (
        "test_container.py::test_a_started_container_runs",
    ),
    "Container > runtime should support basic operations on container > runtime should support stopping container": (
        "test_container.py::test_a_stopped_container_has_exited_by_its_signal",
    ),
    "Container > runtime should support log > runtime should support reopening container log": (
        "test_container.py::test_a_reopened_log_goes_on_in_a_new_file",
    ),
    "Container > runtime should support log > runtime should support starting container with log": (
        "test_container.py::test_both_streams_are_logged_in_the_format_of_the_kubelet",
    ),
    "Container Mount Propagation > runtime should support mount propagation > mount with 'rprivate' should not support propagation": (
        "test_mounts.py::test_private_propagates_nothing",
    ),
    "Container Mount Propagation > runtime should support mount propagation > mount with 'rshared' should support propagation from host to container and vice versa": (
        "test_mounts.py::test_shared_propagates_both_ways",
    ),
    "Container Mount Propagation > runtime should support mount propagation > mount with 'rslave' should support propagation from host to container": (
        "test_mounts.py::test_slave_propagates_from_the_host_only",
    ),
    "Container Mount Readonly > runtime should support readonly mounts > should reject a recursive readonly mount with PROPAGATION_BIDIRECTIONAL": (
        "test_mounts.py::test_recursive_read_only_with_propagation_is_refused",
    ),
    "Container Mount Readonly > runtime should support readonly mounts > should reject a recursive readonly mount with PROPAGATION_HOST_TO_CONTAINER": (
        "test_mounts.py::test_recursive_read_only_with_propagation_is_refused",
    ),
    "Container Mount Readonly > runtime should support readonly mounts > should reject a recursive readonly mount with ReadOnly: false": (
        "test_mounts.py::test_recursive_read_only_on_a_writable_mount_is_refused",
    ),
    "Container Mount Readonly > runtime should support readonly mounts > should support non-recursive readonly mounts": (
        "test_mounts.py::test_read_only_is_not_recursive_by_itself",
    ),
    "Container Mount Readonly > runtime should support readonly mounts > should support recursive readonly mounts": (
        "test_mounts.py::test_recursive_read_only_reaches_mounts_inside",
    ),
    "Container OOM > runtime should output OOMKilled reason > should terminate with exitCode 137 and reason OOMKilled": (
        "test_container.py::test_memory_beyond_the_limit_is_an_oom_kill",
    ),
    "Idempotence > RemoveContainer > should not return an error if not found": (
        "test_idempotence.py::test_removing_an_unknown_container_succeeds",
        "test_idempotence.py::test_removing_a_container_twice_succeeds",
    ),
    "Idempotence > RemoveImage > should not return an error if not found": (
        "test_idempotence.py::test_removing_an_unknown_image_succeeds_each_time",
    ),
    "Idempotence > RemovePodSandbox > should not return an error if not found": (
        "test_idempotence.py::test_removing_an_unknown_pod_succeeds",
    ),
    "Idempotence > StopContainer > should not return an error if already stopped": (
        "test_idempotence.py::test_stopping_a_container_that_does_not_run_succeeds",
    ),
    "Idempotence > StopContainer > should not return an error if not found": (
        "test_idempotence.py::test_stopping_an_unknown_container_succeeds",
    ),
    "Idempotence > StopPodSandbox > should not return an error if already stopped": (
        "test_idempotence.py::test_stopping_a_pod_twice_succeeds",
    ),
    "Idempotence > StopPodSandbox > should not return an error if not found": (
        "test_idempotence.py::test_stopping_an_unknown_pod_succeeds",
    ),
    "Image Manager > image status get image fields should not have Uid|Username empty": (
        "test_image.py::test_the_user_of_an_image_is_told",
    ),
    "Image Manager > image status should support all kinds of references": (
        "test_image.py::test_status_knows_every_kind_of_reference_and_answers_the_same",
    ),
    "Image Manager > listImage should get exactly 3 image in the result list": (
        "test_image.py::test_different_images_are_listed_apart",
    ),
    "Image Manager > listImage should get exactly 3 repoTags in the result image": (
        "test_image.py::test_one_image_under_three_tags_is_listed_once",
    ),
    "Image Manager > public image should timeout if requested": (
        "test_image.py::test_a_pull_that_the_client_gives_up_leaves_no_half_image",
    ),
    "Image Manager > public image with digest should be pulled and removed": (
        "test_image.py::test_an_image_by_digest_has_the_digest_and_no_tag",
    ),
    "Image Manager > public image with tag should be pulled and removed": (
        "test_image.py::test_an_image_with_a_tag_is_pulled_and_removed",
    ),
    "Image Manager > public image without tag should be pulled and removed": (
        "test_image.py::test_an_image_without_a_tag_is_the_latest",
    ),
    "Image Manager > removing image by one tag should remove all tags": (
        "test_image.py::test_removing_one_tag_removes_all_tags",
    ),
    "Image Manager > removing image from one registry should remove all tags from other registries": (
        "test_image.py::test_removing_an_image_removes_its_names_of_other_registries",
    ),
    "Image Consistency > should list and get image status immediately after pulling": (
        "test_image.py::test_an_image_is_there_at_once_after_its_pull_and_gone_at_once_after_its_removal",
    ),
    "Image Consistency > should not fail on simultaneous RemoveImage calls": (
        "test_image.py::test_removals_of_one_image_at_once_all_succeed_and_see_it_gone",
    ),
    "Image Consistency > should not list or get image status immediately after removal": (
        "test_image.py::test_an_image_is_there_at_once_after_its_pull_and_gone_at_once_after_its_removal",
    ),
    "Image Identifier Consistency > should return the same image identifier across all APIs": (
        "test_image.py::test_one_identity_in_every_reply",
    ),
    "Image Identifier Consistency > should return the same image identifier when pulled from different registries": (
        "test_image.py::test_one_identity_from_different_registries",
    ),
    "Image Volume [Feature:ImageVolume] > should correctly mount image and enforce read-only": (
        "test_image_volume.py::test_an_image_is_mounted_read_only_and_its_programs_run",
    ),
    "Image Volume [Feature:ImageVolume] > should reject Image Volume with Readonly set to false": (
        "test_image_volume.py::test_a_writable_image_volume_is_refused",
    ),
    "Image Volume [Feature:ImageVolume] > should return image digest in ContainerStatus mounts": (
        "test_image_volume.py::test_the_status_tells_the_image_of_a_mount",
    ),
    "Image Volume [Feature:ImageVolume] > subPath > should fail when subPath does not exist in the image": (
        "test_image_volume.py::test_a_sub_path_that_is_not_in_the_image_is_refused",
    ),
    "Image Volume [Feature:ImageVolume] > subPath > should succeed when using a valid subPath": (
        "test_image_volume.py::test_a_sub_path_shows_that_folder_only",
    ),
    "Multiple Containers > when running multiple containers in a pod > should support container exec": (
        "test_multi_container.py::test_each_container_runs_commands",
    ),
    "Multiple Containers > when running multiple containers in a pod > should support container log": (
        "test_multi_container.py::test_each_container_has_its_log",
    ),
    "Multiple Containers > when running multiple containers in a pod > should support network": (
        "test_multi_container.py::test_the_web_server_is_reached_from_the_host_and_from_its_neighbour",
    ),
    "Networking > runtime should support networking > runtime should support DNS config": (
        "test_networking.py::test_the_resolver_is_configured_as_asked",
    ),
    "Networking > runtime should support networking > runtime should support port mapping with host port and container port": (
        "test_networking.py::test_a_host_port_leads_to_the_container_port_and_is_free_afterwards",
    ),
    "Networking > runtime should support networking > runtime should support port mapping with only container port": (
        "test_networking.py::test_a_container_port_is_reached_at_the_pods_address",
    ),
    "Networking > runtime should support networking > runtime should support set hostname": (
        "test_networking.py::test_the_host_name_is_set",
    ),
    "NRI > CreateContainer contract > should fail CreateContainer when the NRI hook errors, leak nothing, and allow retry": NO_NRI,
    "NRI > CreateContainer contract > should not expose container while CreateContainer hook is in progress": NO_NRI,
    "NRI > RunPodSandbox contract > should fail RunPodSandbox and clean up when the NRI hook errors, then allow retry": NO_NRI,
    "NRI > RunPodSandbox contract > should not expose sandbox while RunPodSandbox hook is in progress": NO_NRI,
    "NRI > RunPodSandbox contract > should not start workload containers until RunPodSandbox hook completes": NO_NRI,
    "NRI > StopPodSandbox contract > should handle StopPodSandbox idempotently and never reuse sandbox": NO_NRI,
    "NRI > StopPodSandbox contract > should stop all workload containers and keep sandbox accessible while StopPodSandbox hook is in progress": NO_NRI,
    "NRI > container lifecycle (failed container) > should receive CreateContainer, StartContainer, StopContainer, and RemoveContainer for a container that exits with a non-zero code": NO_NRI,
    "NRI > container lifecycle > should receive CreateContainer, StartContainer, StopContainer, and RemoveContainer in strict order with correct metadata": NO_NRI,
    "NRI > plugin synchronization > should receive a callback for container created during the Synchronize call": NO_NRI,
    "NRI > plugin synchronization > should receive information about all containers without the race condition during initialization": NO_NRI,
    "NRI > plugin synchronization > should synchronize a newly connected plugin with existing pods and containers": NO_NRI,
    "NRI > pod sandbox lifecycle > should receive RunPodSandbox, StopPodSandbox, and RemovePodSandbox in strict order with correct metadata": NO_NRI,
    "PodSandbox > runtime should support basic operations on PodSandbox > runtime should support preserving PodSandbox attributes": (
        "test_pod.py::test_metadata_labels_and_annotations_are_kept_as_they_came",
    ),
    "PodSandbox > runtime should support basic operations on PodSandbox > runtime should support removing PodSandbox": (
        "test_pod.py::test_a_removed_pod_is_gone",
    ),
    "PodSandbox > runtime should support basic operations on PodSandbox > runtime should support running PodSandbox": (
        "test_pod.py::test_a_run_pod_is_ready_with_an_address",
    ),
    "PodSandbox > runtime should support basic operations on PodSandbox > runtime should support stopping PodSandbox": (
        "test_pod.py::test_a_stopped_pod_is_not_ready_without_address_and_stays_listed",
    ),
    "PodSandbox > runtime should support metrics operations > runtime should support listing pod sandbox metrics": (
        "test_pod.py::test_pod_metrics_have_a_value_per_label_key",
    ),
    "PodSandbox > runtime should support metrics operations > runtime should support returning metrics descriptors": (
        "test_pod.py::test_metric_descriptors_are_complete",
    ),
    "PodSandbox > runtime should support sysctls > should support safe sysctls": (
        "test_pod.py::test_kernel_parameters_are_set_in_the_pod",
    ),
    "PodSandbox > runtime should support sysctls > should support unsafe sysctls": (
        "test_pod.py::test_kernel_parameters_are_set_in_the_pod",
    ),
    "Runtime info > runtime should support returning runtime info > runtime should return runtime conditions": (
        "test_runtime_info.py::test_runtime_and_network_are_ready",
    ),
    "Runtime info > runtime should support returning runtime info > runtime should return version info": (
        "test_runtime_info.py::test_version_is_complete_and_is_what_the_kubelet_compares_with",
    ),
    "Security Context > NamespaceOption > runtime should support ContainerPID": (
        "test_namespaces.py::test_container_pid_makes_the_program_the_first_process",
    ),
    "Security Context > NamespaceOption > runtime should support HostIpc is false": (
        "test_namespaces.py::test_pod_ipc_does_not_show_the_shared_memory_of_the_host_but_that_of_the_pod",
    ),
    "Security Context > NamespaceOption > runtime should support HostIpc is true": (
        "test_namespaces.py::test_host_ipc_shows_the_shared_memory_of_the_host",
    ),
    "Security Context > NamespaceOption > runtime should support HostNetwork is false": (
        "test_namespaces.py::test_listeners_of_the_host_are_seen_in_its_network_only",
    ),
    "Security Context > NamespaceOption > runtime should support HostNetwork is true": (
        "test_namespaces.py::test_listeners_of_the_host_are_seen_in_its_network_only",
    ),
    "Security Context > NamespaceOption > runtime should support HostPID": (
        "test_namespaces.py::test_host_pid_shows_the_processes_of_the_host",
    ),
    "Security Context > NamespaceOption > runtime should support PodPID": (
        "test_namespaces.py::test_pod_pid_is_shared_by_the_containers_of_a_pod",
    ),
    "Security Context > NoNewPrivs > should allow privilege escalation when false": (
        "test_security_context.py::test_a_setuid_program_gains_privileges_unless_forbidden",
    ),
    "Security Context > NoNewPrivs > should not allow privilege escalation when true": (
        "test_security_context.py::test_a_setuid_program_gains_privileges_unless_forbidden",
    ),
    "Security Context > SeccompProfilePath > runtime should ignore a seccomp profile that blocks setting hostname when privileged": (
        "test_seccomp.py::test_a_privileged_container_ignores_the_profile",
    ),
    "Security Context > SeccompProfilePath > runtime should not block setting host name with unconfined seccomp and SYS_ADMIN": (
        "test_seccomp.py::test_the_host_name_may_be_set_when_unconfined",
    ),
    "Security Context > SeccompProfilePath > runtime should support an seccomp profile that blocks setting hostname with SYS_ADMIN": (
        "test_seccomp.py::test_the_host_name_may_not_be_set_under_a_profile_that_forbids_it",
    ),
    "Security Context > SeccompProfilePath > should support nil profile, which is unconfined": (
        "test_seccomp.py::test_no_profile_is_no_filter",
    ),
    "Security Context > SeccompProfilePath > should support seccomp default on the container": (
        "test_seccomp.py::test_an_empty_profile_is_the_runtimes_own",
    ),
    "Security Context > SeccompProfilePath > should support seccomp localhost profile on the container": (
        "test_seccomp.py::test_a_profile_of_the_node_is_enforced",
    ),
    "Security Context > SeccompProfilePath > should support seccomp unconfined on the container": (
        "test_seccomp.py::test_unconfined_is_no_filter",
    ),
    "Security Context > SupplementalGroupsPolicy > when SupplementalGroupsPolicy=Merge (Default) > if the container's primary UID belongs to some groups in the image, runtime should add SupplementalGroups to them": (
        "test_security_context.py::test_the_policy_of_supplemental_groups",
    ),
    "Security Context > SupplementalGroupsPolicy > when SupplementalGroupsPolicy=Strict > even if the container's primary UID belongs to some groups in the image, runtime should not add SupplementalGroups to them": (
        "test_security_context.py::test_the_policy_of_supplemental_groups",
    ),
    "Security Context > UserNamespaces > when Host idmap mount support is needed > runtime should support NamespaceMode_POD": (
        "test_user_namespaces.py::test_a_namespace_of_the_pod",
        "test_user_namespaces.py::test_a_namespace_of_the_pod_is_refused_where_it_is_not_offered",
    ),
    "Security Context > UserNamespaces > when Host idmap mount support is not needed > runtime should fail if container ID 0 is not mapped": (
        "test_user_namespaces.py::test_a_bad_request_is_refused",
    ),
    "Security Context > UserNamespaces > when Host idmap mount support is not needed > runtime should fail if more than one mapping provided": (
        "test_user_namespaces.py::test_a_bad_request_is_refused",
    ),
    "Security Context > UserNamespaces > when Host idmap mount support is not needed > runtime should fail with NamespaceMode_CONTAINER": (
        "test_user_namespaces.py::test_a_bad_request_is_refused",
    ),
    "Security Context > UserNamespaces > when Host idmap mount support is not needed > runtime should fail with NamespaceMode_TARGET": (
        "test_user_namespaces.py::test_a_bad_request_is_refused",
    ),
    "Security Context > UserNamespaces > when Host idmap mount support is not needed > runtime should support NamespaceMode_NODE": (
        "test_user_namespaces.py::test_the_namespace_of_the_node_is_the_usual_case",
    ),
    "Security Context > bucket > runtime should return error if RunAsGroup is set without RunAsUser": (
        "test_security_context.py::test_a_group_without_a_user_is_refused",
    ),
    "Security Context > bucket > runtime should support MaskedPaths": (
        "test_security_context.py::test_a_masked_file_cannot_be_read_or_run",
    ),
    "Security Context > bucket > runtime should support Privileged is false": (
        "test_security_context.py::test_an_ordinary_container_may_not",
    ),
    "Security Context > bucket > runtime should support Privileged is true": (
        "test_security_context.py::test_a_privileged_container_may_do_what_root_may",
    ),
    "Security Context > bucket > runtime should support ReadonlyPaths": (
        "test_security_context.py::test_a_read_only_path_cannot_be_written",
    ),
    "Security Context > bucket > runtime should support RunAsGroup": (
        "test_security_context.py::test_a_group_with_a_user",
    ),
    "Security Context > bucket > runtime should support RunAsUser": (
        "test_security_context.py::test_a_user_by_number",
    ),
    "Security Context > bucket > runtime should support RunAsUserName": (
        "test_security_context.py::test_a_user_by_name",
    ),
    "Security Context > bucket > runtime should support SupplementalGroups": (
        "test_security_context.py::test_supplemental_groups",
    ),
    "Security Context > bucket > runtime should support adding ALL capabilities": (
        "test_security_context.py::test_all_capabilities_added",
    ),
    "Security Context > bucket > runtime should support adding capability": (
        "test_security_context.py::test_an_added_capability_is_there",
        "test_security_context.py::test_an_ordinary_container_may_not",
    ),
    "Security Context > bucket > runtime should support dropping ALL capabilities": (
        "test_security_context.py::test_all_capabilities_dropped",
    ),
    "Security Context > bucket > runtime should support dropping capability": (
        "test_security_context.py::test_a_dropped_capability_is_gone",
    ),
    "Security Context > bucket > runtime should support that ReadOnlyRootfs is false": (
        "test_security_context.py::test_the_root_file_system_is_writable_or_not",
    ),
    "Security Context > bucket > runtime should support that ReadOnlyRootfs is true": (
        "test_security_context.py::test_the_root_file_system_is_writable_or_not",
    ),
    "Streaming > runtime should support streaming interfaces > runtime should support attach": (
        "test_streaming.py::test_attach_reaches_the_first_process_and_ends_with_it",
    ),
    "Streaming > runtime should support streaming interfaces > runtime should support exec with tty=false and stdin=false": (
        "test_streaming.py::test_exec_brings_both_streams_and_success",
    ),
    "Streaming > runtime should support streaming interfaces > runtime should support exec with tty=true and stdin=true": (
        "test_streaming.py::test_exec_on_a_terminal_has_its_size_and_takes_input",
    ),
    "Streaming > runtime should support streaming interfaces > runtime should support portforward": (
        "test_streaming.py::test_a_port_is_forwarded_for_many_connections",
    ),
    "Streaming > runtime should support streaming interfaces > runtime should support portforward in host network": (
        "test_streaming.py::test_a_port_is_forwarded_into_the_network_of_the_host",
    ),
}
