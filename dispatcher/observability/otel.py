"""Sends recorded calls to an OpenTelemetry collector. The only module that knows the SDK, an extra that few need.

Recording is ours and cheap; a finished tree is turned into spans of the SDK here, on the thread of the trace log, with
the times that were measured. So a slow or absent collector costs no call anything: the SDK queues within a bound, sends
in a thread of its own, and drops what does not fit. Nothing is registered globally.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

from dispatcher.errors import DispatcherError
from dispatcher.observability.redaction import redact_text
from dispatcher.observability.traces import plain_facts
from dispatcher.spans import Span, Tree

_SEND_TIMEOUT_S: Final = 5
_CLOSE_TIMEOUT_S: Final = 5.0

# The names that OpenTelemetry gives to what several systems know; what is ours alone is named dispatcher.*.
_NAMES: Final = {
    "namespace": "k8s.namespace.name",
    "pod": "k8s.pod.name",
    "uid": "k8s.pod.uid",
    "container": "k8s.container.name",
    "container_id": "container.id",
    "image": "container.image.name",
}


class ExporterMissing(DispatcherError):
    """The extra `otel` is not installed."""


class OtlpExporter:
    """Sends trees over OTLP with HTTP and protobuf. Thread-safe; `export` never blocks on the collector.

    Args:
        endpoint: the whole address, such as "http://127.0.0.1:4318/v1/traces". Headers for it, where the collector asks
            for some, come from the environment variable OTEL_EXPORTER_OTLP_HEADERS, so that they are in no file of ours.
        sample_ratio: how many of the calls that no traced client made are sent, from 0 to 1; a client's decision is kept.
        version: of this program.
        node_uuid: of this node instance.

    Raises:
        ExporterMissing: the SDK cannot be imported.
    """

    def __init__(self, endpoint: str, *, sample_ratio: float, version: str, node_uuid: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise ExporterMissing(
                "tracing.otlp_endpoint is set, but the OpenTelemetry SDK is not there: install cri-dispatcher[otel]."
            ) from error
        resource = Resource.create(
            {"service.name": "dispatcher", "service.version": version, "service.instance.id": node_uuid}
        )
        sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("dispatcher", version)

    def export(self, tree: Tree, spans: Sequence[Span]) -> None:
        """Hand one finished call to the SDK."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": tree.remote} if tree.remote else {}
        outside = TraceContextTextMapPropagator().extract(carrier)
        contexts: dict[Span | None, Any] = {}
        for span in spans:
            is_root = span.parent is None
            made = self._tracer.start_span(
                span.name,
                context=outside if is_root else contexts.get(span.parent, contexts[spans[0]]),
                kind=SpanKind.SERVER if is_root else SpanKind.INTERNAL,
                attributes=_attributes(span, is_root=is_root),
                start_time=tree.began_ns + span.started_ns,
            )
            contexts[span] = set_span_in_context(made)
            if span.error:
                made.set_status(Status(StatusCode.ERROR, redact_text(span.error)))
            made.end(end_time=tree.began_ns + max(span.ended_ns, span.started_ns))

    def close(self) -> None:
        """Send what is waiting, for a few seconds at most."""
        thread = threading.Thread(target=self._provider.shutdown, name="otlp-close", daemon=True)
        thread.start()
        thread.join(_CLOSE_TIMEOUT_S)


def _attributes(span: Span, *, is_root: bool) -> dict[str, str | int | float | bool]:
    found = {_NAMES.get(key, f"dispatcher.{key}"): value for key, value in plain_facts(span).items() if value != ""}
    if is_root:
        found |= {"rpc.system": "grpc", "rpc.method": span.name}
    if span.count > 1:
        found["dispatcher.count"] = span.count
    return found
