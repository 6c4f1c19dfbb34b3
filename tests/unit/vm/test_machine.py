"""What the virtual machine's driver promises without booting one: bounded, honest, and nothing of the host at risk."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.vm import __main__ as command
from tests.vm import machine
from tests.vm.image import GUEST, Image, copy_repository, guest_packages
from tests.vm.machine import NoResultError, Size, qemu_argv

IMAGE = Image(disk=Path("/cache/disk"), kernel=Path("/cache/kernel"), initrd=Path("/cache/initrd"))


def argv(accelerator: str) -> list[str]:
    return qemu_argv(IMAGE, Path("/run/x"), console=Path("/run/log"), size=Size(), accelerator=accelerator)


@pytest.mark.parametrize(("accelerator", "cpu"), [("tcg", "max"), ("kvm", "host")])
def test_guest_has_no_network_and_cannot_write_the_image(accelerator: str, cpu: str) -> None:
    made = argv(accelerator)
    assert made[made.index("-nic") + 1] == "none"
    assert made[made.index("-cpu") + 1] == cpu
    drives = [made[at + 1] for at, word in enumerate(made) if word == "-drive"]
    assert [("snapshot=on" in drive, drive.split(",")[0]) for drive in drives] == [
        (True, "file=/cache/disk"),
        (False, "file=/run/x"),
    ]


def test_a_guest_that_does_not_end_is_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Output is passed on while the program runs, and at the deadline it is killed, whatever it does with signals."""
    begun = time.monotonic()
    script = "trap '' TERM; echo $$ > pid; echo first; while :; do sleep 0.1; done"
    machine._play(["sh", "-c", script], deadline_s=1, cwd=tmp_path)
    assert time.monotonic() - begun < 30
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    printed = capfd.readouterr().out
    assert "] first" in printed
    assert "deadline" in printed


@pytest.mark.parametrize("left", [None, "", "nonsense"])
def test_no_exit_code_is_no_success(tmp_path: Path, left: str | None) -> None:
    """A guest that crashed, hung or was switched off is told from one whose job ended, with the end of its console."""
    if left is not None:
        (tmp_path / "exit-code").write_text(left)
    (tmp_path / "console.log").write_text("Kernel panic - not syncing\n")
    with pytest.raises(NoResultError, match="Kernel panic"):
        machine._exit_code(tmp_path)
    (tmp_path / "exit-code").write_text("3\n")
    assert machine._exit_code(tmp_path) == 3


def test_a_run_without_tests_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "systemd.xml"
    assert command._count(report, "systemd") == 0
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert command._count(report, "systemd") == 9
    assert "5 passed, 2 failed, 2 skipped" in capsys.readouterr().out


def test_guest_has_what_the_tests_need() -> None:
    """The host script's needs are the guest's, and a selection names folders that exist."""
    assert {"docker.io", "containernetworking-plugins", "skopeo", "gcc", "systemd-sysv"} <= set(guest_packages())
    project = GUEST.parents[2]
    assert [path for paths in command.SELECTION.values() for path in paths if not (project / path).exists()] == []


def test_repository_is_copied_as_it_is(tmp_path: Path) -> None:
    copy_repository(tmp_path)
    assert (tmp_path / "tests/unit/vm/test_machine.py").read_text() == Path(__file__).read_text()
    assert (tmp_path / "scripts/host.sh").stat().st_mode & 0o100
    assert not (tmp_path / ".git").exists()
