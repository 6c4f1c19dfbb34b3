"""scripts/ on a throw-away copy of this machine: what host.sh installs, starts and leaves; the root of a chroot.

The copy is an overlay of the root file system, seen by one mount namespace: nothing that happens there is real here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PACKAGE = "docker-registry"
POLICY = "/usr/sbin/policy-rc.d"

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

ISOLATED = ("unshare", "--mount", "--propagation", "private")
ENTER = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir -p "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
cp "$2"/*.sh "$2"/*.py tmp/
exec chroot . bash -c "$3"
"""


PRELUDE = f"""
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
host() {{ bash /tmp/host.sh "$@"; }}
state() {{
  dpkg-query -W -f '${{db:Status-Status}} ${{Package}}\\n' | grep '^installed' | sort
  cut -d: -f1 /etc/passwd /etc/group | sort
  find /etc/systemd/system -type l | sort
  ls {POLICY} 2>/dev/null || true
}}
rm -rf /var/lib/cri-dispatcher-host
mkdir -p /etc/systemd/system
apt-get purge -y -q {PACKAGE} >/dev/null 2>&1 </dev/null
rm -rf /var/lib/{PACKAGE}
userdel {PACKAGE} 2>/dev/null || true; groupdel {PACKAGE} 2>/dev/null || true
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A way to run a bash script on a fresh copy of this machine."""

    folder: Path

    def run(self, script: str, *, prelude: str = PRELUDE) -> str:
        """Run the script with `state` (packages, accounts, services, policy) defined; return what it printed."""
        done = subprocess.run(
            [*ISOLATED, "bash", "-c", ENTER, "enter", str(self.folder), str(SCRIPTS), prelude + script],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A copy of this machine without the package that the tests install."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if shutil.which("apt-get") is None or not Path(f"/var/lib/dpkg/info/{PACKAGE}.list").exists():
        pytest.skip(f"{PACKAGE} is not a package of this machine")
    try:
        Machine(tmp_path).run("true", prelude="")
    except AssertionError as exc:
        pytest.skip(f"no overlay of the root file system: {exc}")
    return Machine(tmp_path)


def test_installs_without_side_effects_and_takes_back(machine: Machine) -> None:
    """What is missing comes in, no service is started or enabled, no policy stays, and `clean` restores everything."""
    out = machine.run(f"""
        rm -f {POLICY}
        state >/tmp/before
        echo missing $(host missing demo)
        host install demo
        command -v docker-registry
        echo recorded $(cat /var/lib/cri-dispatcher-host/packages)
        echo links $(find /etc/systemd/system -name 'docker-registry*')
        echo policy $(ls {POLICY} 2>/dev/null)
        host install demo
        host clean
        state >/tmp/after
        diff /tmp/before /tmp/after && echo same
        ls -d /var/lib/cri-dispatcher-host 2>/dev/null || echo forgotten
    """).splitlines()
    assert f"missing {PACKAGE}" in out
    assert f"/usr/bin/{PACKAGE}" in out
    assert f"recorded {PACKAGE}" in out
    assert "links" in out
    assert "policy" in out
    assert out[-2:] == ["same", "forgotten"]


@pytest.mark.parametrize("answer", [0, 101], ids=["lets services start", "forbids it already"])
def test_keeps_the_machines_own_policy(machine: Machine, answer: int) -> None:
    """A policy that the machine has is byte for byte the same afterwards, and still no service was started."""
    out = machine.run(f"""
        printf '#!/bin/sh\\necho "$@" >>/tmp/asked\\nexit {answer}\\n' >{POLICY}
        chmod 0755 {POLICY}
        cp {POLICY} /tmp/policy
        host install demo
        cmp {POLICY} /tmp/policy && echo untouched
        echo asked $(grep -c . /tmp/asked)
    """)
    asked = int(out.split("asked ")[1])
    assert "untouched" in out
    # A policy that denies answers our three questions and then apt's; one that allows is covered after its first answer.
    assert asked > 3 if answer else asked == 1


def test_removes_the_policy_after_a_failure(machine: Machine) -> None:
    """An installation that fails leaves no policy behind, and what came in is on record."""
    out = machine.run(f"""
        rm -f {POLICY}
        printf '#!/bin/sh\\nls {POLICY} >&2; exit 1\\n' >/usr/local/bin/fail
        chmod 0755 /usr/local/bin/fail
        echo 'DPkg::Post-Invoke {{"/usr/local/bin/fail";}};' >/etc/apt/apt.conf.d/zz-fail
        host install demo || echo failed
        ls {POLICY} 2>/dev/null || echo gone
        cat /var/lib/cri-dispatcher-host/packages
    """)
    assert out.split() == ["failed", "gone", PACKAGE]


def test_removes_the_policy_of_a_killed_run(machine: Machine) -> None:
    """A policy that a killed run left is recognised and removed; somebody else's is not."""
    out = machine.run(f"""
        printf '#!/bin/sh\\n# cri-dispatcher: temporary, see scripts/host.sh\\nexit 101\\n' >{POLICY}
        host clean
        ls {POLICY} 2>/dev/null || echo gone
        printf '#!/bin/sh\\nexit 101\\n' >{POLICY}
        host clean
        ls {POLICY}
    """)
    assert out.split() == ["gone", POLICY]


def test_keeps_what_came_into_use(machine: Machine) -> None:
    """`clean` keeps a package whose data folder somebody has filled, or that runs, and removes it afterwards."""
    out = machine.run(f"""
        rm -f {POLICY}
        host install demo
        mkdir -p /var/lib/{PACKAGE}/docker
        host clean
        command -v {PACKAGE}
        rm -rf /var/lib/{PACKAGE}
        printf 'version: 0.1\\nstorage: {{inmemory: {{}}}}\\nhttp: {{addr: 127.0.0.1:0}}\\n' >/tmp/registry.yml
        {PACKAGE} serve /tmp/registry.yml >/dev/null 2>&1 &
        until [ /proc/$!/exe -ef /usr/bin/{PACKAGE} ]; do sleep 0.05; done
        host clean
        command -v {PACKAGE}
        kill $!
        wait $! || true
        host clean
        ls /usr/bin/{PACKAGE} 2>/dev/null || echo removed
    """)
    assert out.split() == [f"/usr/bin/{PACKAGE}", f"/usr/bin/{PACKAGE}", "removed"]


def test_engine_from_elsewhere_counts(machine: Machine) -> None:
    """A dockerd that is no Debian package satisfies the need: docker.io is not asked for."""
    out = machine.run("""
        dpkg --remove --force-depends docker.io >/dev/null 2>&1
        host missing demo | grep docker.io
        printf '#!/bin/sh\\n' >/usr/local/bin/dockerd
        chmod 0755 /usr/local/bin/dockerd
        host missing demo | grep docker.io || echo content
    """)
    assert out.split() == ["docker.io", "content"]


def test_whole_root_makes_a_chroot_safe_for_engines(machine: Machine) -> None:
    """Who joins the mount namespace of a process in a chroot lands outside; behind whole_root.py, in the chroot."""
    out = machine.run(
        """
        touch /mark
        cd /usr/lib
        nsenter --mount=/proc/self/ns/mnt ls /mark 2>/dev/null || echo outside
        python3 /tmp/whole_root.py sh -c 'nsenter --mount=/proc/self/ns/mnt ls /mark; pwd'
        python3 /tmp/whole_root.py python3 /tmp/whole_root.py echo twice
        """,
        prelude="",
    )
    assert out.split() == ["outside", "/mark", "/usr/lib", "twice"]
