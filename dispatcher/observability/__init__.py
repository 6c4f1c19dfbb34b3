"""What an operator sees of the daemon from outside: log lines, metrics, health, and what systemd is told.

Nothing in here knows the core: the composition root makes these objects and hands each part the one it needs. There is
no module-level registry, so that two daemons in one process (tests) do not share a counter.
"""

from dispatcher.observability.health import Health, HealthServer
from dispatcher.observability.logformat import configure_logging, current_context, log_context, make_correlation_id
from dispatcher.observability.loop_lag import LoopProbe
from dispatcher.observability.metrics import Metrics
from dispatcher.observability.systemd import Notifier

__all__ = [
    "Health",
    "HealthServer",
    "LoopProbe",
    "Metrics",
    "Notifier",
    "configure_logging",
    "current_context",
    "log_context",
    "make_correlation_id",
]
