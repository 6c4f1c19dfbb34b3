"""Files of ours that a pod's containers see: resolv.conf, hosts, hostname, in the pod's state folder.

Written before the sandbox is made, mounted by every runtime. A file that is absent is not mounted. Everything written
here passed `cri.validate`, so no value can hold a line break.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dispatcher.effects import effect
from dispatcher.model import Attachment, PodSpec

_HOSTS_HEAD = (
    "127.0.0.1\tlocalhost\n"
    "::1\tlocalhost ip6-localhost ip6-loopback\n"
    "fe00::0\tip6-localnet\n"
    "ff02::1\tip6-allnodes\n"
    "ff02::2\tip6-allrouters\n"
)


def resolv_conf(pod: PodSpec, host: str) -> str:
    """Return the pod's resolv.conf: from its DNS config, or the node's own where CRI gave none."""
    if pod.dns is None:
        return host
    lines = [f"nameserver {server}" for server in pod.dns.servers]
    if pod.dns.searches:
        lines.append("search " + " ".join(pod.dns.searches))
    if pod.dns.options:
        lines.append("options " + " ".join(pod.dns.options))
    return "".join(f"{line}\n" for line in lines)


def hosts(pod: PodSpec, attachment: Attachment | None) -> str:
    """Return the pod's hosts file. The kubelet mounts its own over it; other clients get this one."""
    own = "".join(f"{ip}\t{pod.hostname}\n" for ip in (attachment.ips if attachment else ()) if pod.hostname)
    return _HOSTS_HEAD + own


def _write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)


@effect("pod_files.write")
def write_pod_files(folder: Path, pod: PodSpec, attachment: Attachment | None) -> None:
    """Write the files, making the folder (0700 for its parent, 0755 for itself: containers of any user read them).

    Idempotent: existing files are replaced in place, so that a mount of one stays valid.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        host = Path("/etc/resolv.conf").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        host = ""
    _write(folder, "resolv.conf", resolv_conf(pod, host))
    if pod.uses_host_network:
        try:
            _write(folder, "hosts", Path("/etc/hosts").read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            _write(folder, "hosts", _HOSTS_HEAD)
        _write(folder, "hostname", os.uname().nodename + "\n")
    else:
        _write(folder, "hosts", hosts(pod, attachment))
        if pod.hostname:
            _write(folder, "hostname", pod.hostname + "\n")


@effect("pod_files.remove")
def remove_pod_files(folder: Path) -> None:
    """Remove the pod's folder with all that is in it. Idempotent."""
    shutil.rmtree(folder, ignore_errors=True)
