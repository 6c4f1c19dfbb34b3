"""A real program run as a child of the test session, stopped by its pid and never by its name.

Nothing here knows what the program is. The invariant: a started child is either running under the recorded pid or has
been waited for, so no test leaves a process behind and no signal ever hits a stranger.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# How many times longer than usual this machine may take: more than 1 where everything is emulated. Every wait is scaled
# by it, so that a slow machine is no fault; what a test claims about times of its own is not.
PATIENCE = float(os.environ.get("DISPATCHER_LAB_PATIENCE") or 1)
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class PartMissingError(Exception):
    """A real part (program, capability) is not on this machine; fixtures turn it into a skip with this reason."""


def find_program(name: str) -> str:
    """Return the path of a program, looking in the system folders also when PATH lacks them.

    Raises:
        PartMissingError: The program is not installed.
    """
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":" + SYSTEM_PATH)
    if path is None:
        raise PartMissingError(f"{name} is not installed")
    return path


def require_root() -> None:
    """Raise PartMissingError unless the tests run as root."""
    if os.geteuid() != 0:
        raise PartMissingError("needs root")


def has_capability(bit: int) -> bool:
    """Tell whether this process holds a capability, by its number (24 is CAP_SYS_RESOURCE)."""
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> bit & 1)


def lab_folder(kind: str) -> Path:
    """Make a short-named temporary folder; socket paths below it must stay under 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix=f"cri-lab-{kind}-"))
    (path / "owner").write_text(str(os.getpid()))
    return path


def patient(seconds: float) -> float:
    """Scale a limit for waiting to this machine."""
    return seconds * PATIENCE


def wait_until(claim: Callable[[], bool], *, timeout_s: float, what: str, interval_s: float = 0.02) -> None:
    """Poll a claim about another process until it holds, for `patient(timeout_s)`.

    Raises:
        TimeoutError: The claim did not hold in time; the message is `what`.
    """
    deadline = time.monotonic() + patient(timeout_s)
    while not claim():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} (waited {patient(timeout_s):g} s)")
        time.sleep(interval_s)


class Child:
    """One program with its log file. Starting a running child or stopping a stopped one is an error or a no-op."""

    def __init__(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.argv = list(argv)
        self.log = log
        self._env = {**os.environ, "PATH": os.environ.get("PATH", "") + ":" + SYSTEM_PATH, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The pid of the running program."""
        assert self._process is not None, f"{self.argv[0]} is not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the program runs now."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, pass_fds: Sequence[int] = ()) -> None:
        """Start the program in a session of its own, so that a Ctrl-C of the test run does not reach it first."""
        assert not self.running, f"{self.argv[0]} runs already"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
                pass_fds=pass_fds,
            )

    def wait_ready(self, claim: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait until the program answers; its death meanwhile is reported with the end of its log."""

        def ready_or_dead() -> bool:
            if not self.running:
                raise RuntimeError(f"{self.argv[0]} ended while starting:\n{self.log_tail()}")
            return claim()

        try:
            wait_until(ready_or_dead, timeout_s=timeout_s, what=f"{self.argv[0]} is not ready")
        except TimeoutError as exc:
            raise TimeoutError(f"{exc}\n{self.log_tail()}") from None

    def signal(self, number: int) -> None:
        """Send a signal to the program itself."""
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the program with SIGKILL and wait for it: no handler, no clean-up of its own."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def stop(self, *, timeout_s: float = 20) -> int:
        """End the program politely, by SIGKILL after the timeout. Returns its exit code as Popen reports it."""
        if self._process is None:
            return 0
        self.signal(signal.SIGTERM)
        try:
            return self._process.wait(patient(timeout_s))
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def log_text(self) -> str:
        """Everything that the program printed so far, over all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 40) -> str:
        """The end of the log, for failure messages."""
        return "\n".join(self.log_text().splitlines()[-lines:])
