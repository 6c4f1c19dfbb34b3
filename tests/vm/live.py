"""A pytest plugin that prints each failure when it happens: a run that is cut off still tells what it found."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print why a test failed, below its name."""
    if report.failed:
        print(f"\n{report.when} of {report.nodeid} failed:\n{report.longreprtext[-6000:]}", flush=True)
