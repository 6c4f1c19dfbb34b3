"""An engine that the user has is never touched: its bridge, the firewall and the host's settings stay as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.child import PartMissingError, find_program, require_root

ROOT = Path(__file__).parents[2]

# Runs in a network namespace of its own, which plays the host: with a bridge docker0 as a user's engine leaves it.
SCRIPT = """
import subprocess
from pathlib import Path
from tests.lab.engine import Engine

def facts():
    run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout
    links = [line for line in run("ip", "-o", "address").splitlines() if "docker0" in line]
    rules = [line for line in run("iptables-save").splitlines() if not line.startswith("#")]
    return links, rules, Path("/proc/sys/net/ipv4/ip_forward").read_text()

for command in ("link set lo up", "link add docker0 type bridge", "address add 172.17.0.1/16 dev docker0"):
    subprocess.run(["ip", *command.split()], check=True)
Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
before = facts()
engine = Engine()
try:
    engine.start()
    assert engine.request("GET", "/info").status == 200
    assert facts() == before, (before, facts())
finally:
    engine.close()
assert facts() == before, (before, facts())
print("untouched")
"""


@pytest.mark.lab
def test_private_engine_leaves_docker0_alone() -> None:
    """Starting and ending our engine changes neither docker0, nor a firewall rule, nor forwarding."""
    try:
        require_root()
        for program in ("dockerd", "unshare", "iptables-save"):
            find_program(program)
    except PartMissingError as exc:
        pytest.skip(str(exc))
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["untouched"], done.stderr
