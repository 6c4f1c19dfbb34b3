"""Debian 12 with systemd and cgroup v2 in QEMU: `python -m tests.vm build | test | run | clean`. See --help of each."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from tests.vm import image
from tests.vm.machine import Job, NoResultError, Size, choose_accelerator, run

DRIVERS: Final = ("systemd", "cgroupfs")
# How much longer than elsewhere tests and their waits may take under software emulation.
PATIENCE: Final = {"kvm": 1, "tcg": 10}
TIMEOUT_S: Final = 60  # pytest's own limit for a test, as in pyproject.toml

# What depends on cgroup v2, on systemd, or on the kernel of a real machine. With the cgroupfs driver, the part that
# depends on the driver.
SELECTION: Final = {
    "systemd": (
        "tests/unit/vm_sizing",
        "tests/unit/docker_shim",
        "tests/systemd",
        "tests/docker",
        "tests/cri/test_runtime_info.py",
        "tests/cri/test_container.py",
        "tests/cri/test_security_context.py",
    ),
    "cgroupfs": ("tests/systemd/test_cgroups.py", "tests/docker/test_resources.py", "tests/docker/test_pods.py"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is the job's, 2 without a result."""
    options = _parser().parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        code: int = options.action(options)
    except (image.BuildError, NoResultError) as error:
        print(f"vm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vm: interrupted", file=sys.stderr)
        return 130
    return code


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="build the disk image, if it is not there yet")
    command.set_defaults(action=_build)
    command = commands.add_parser("clean", help="remove cached images")
    command.set_defaults(action=_clean)

    test = commands.add_parser("test", help="run the tests in the guest")
    test.set_defaults(action=_test)
    test.add_argument("--driver", choices=[*DRIVERS, "both"], default="both", help="the engine's cgroup driver")
    test.add_argument("pytest", nargs="*", help="arguments for pytest instead of the usual selection (after --)")

    job = commands.add_parser("run", help="run a command in the guest, as root, in a copy of the repository")
    job.set_defaults(action=_run)
    job.add_argument("--share", type=Path, help="a folder that the guest gets a copy of, as $VM_SHARE")
    job.add_argument("command", nargs="+", help="the command (after --); it leaves files for you in $VM_RESULTS")
    for sub, deadline in ((test, 150), (job, 60)):
        sub.add_argument("--results", type=Path, default=image.CACHE / "results", help="where results are put")
        sub.add_argument("--deadline", type=float, default=deadline, help="minutes (default: %(default)s)")
        sub.add_argument("--memory", type=int, default=4096, help="MiB (default: %(default)s)")
        sub.add_argument("--cpus", type=int, default=2, help="default: %(default)s")
    return parser


def _build(_options: argparse.Namespace) -> int:
    image.build()
    return 0


def _clean(_options: argparse.Namespace) -> int:
    image.clean()
    return 0


def _run(options: argparse.Namespace) -> int:
    return _play(options, shlex.join(options.command), share=options.share)


def _test(options: argparse.Namespace) -> int:
    drivers = DRIVERS if options.driver == "both" else (options.driver,)
    accelerator = choose_accelerator(image.build())
    patience = float(os.environ.get("DISPATCHER_LAB_PATIENCE") or PATIENCE.get(accelerator, 1))
    lines = [
        "code=0",
        f"export DISPATCHER_LAB_PATIENCE={patience:g}",
        "python -m compileall -q dispatcher plugins tests",
    ]
    for driver in drivers:
        argv = [
            *(
                "python",
                "-m",
                "pytest",
                "-v",
                "--color=no",
                "-p",
                "no:cacheprovider",
                "-p",
                "tests.vm.live",
                "--durations=15",
            ),
            f"--timeout={TIMEOUT_S * patience:.0f}",
            f"--junit-xml=/vm/results/{driver}.xml",
            *(options.pytest or SELECTION[driver]),
        ]
        lines.append(f"echo 'vm: tests with the cgroup driver {driver}'")
        lines.append(f"DISPATCHER_LAB_CGROUP_DRIVER={driver} {shlex.join(argv)} || code=$?")
    code = _play(options, "\n".join([*lines, "exit $code"]))
    counted = [_count(options.results / f"{driver}.xml", driver) for driver in drivers]
    return code if all(counted) else code or 2


def _play(options: argparse.Namespace, script: str, *, share: Path | None = None) -> int:
    built = image.build()
    accelerator = choose_accelerator(built)
    image.say(
        f"booting with {accelerator}, {options.cpus} CPUs, {options.memory} MiB; {options.deadline:g} min at most"
    )
    begun = time.monotonic()
    job = Job(script=script, deadline_s=options.deadline * 60, results=options.results, share=share)
    size = Size(cpus=options.cpus, memory_mib=options.memory)
    code = run(built, job, size=size, accelerator=accelerator)
    image.say(f"exit code {code} after {(time.monotonic() - begun) / 60:.1f} min; results are in {options.results}")
    return code


def _count(report: Path, driver: str) -> int:
    """Print a line on a report; returns how many tests it has, 0 for none or no report."""
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        image.say(f"{driver}: no report")
        return 0
    tests, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    image.say(f"{driver}: {tests - failed - errors - skipped} passed, {failed + errors} failed, {skipped} skipped")
    return tests


if __name__ == "__main__":
    sys.exit(main())
