"""The schema of the section `plugins.streaming` of dispatcher.yaml."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _loopback(host: str) -> str:
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ValueError("must be a loopback address: the kubelet on this node is the only client")
    return host


class StreamingConfig(BaseModel):
    """Where exec, attach and port-forward are served, and their limits."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    host: Annotated[str, AfterValidator(_loopback)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    idle_s: Annotated[float, Field(strict=False, gt=0)] = 4 * 3600.0
    token_lifetime_s: Annotated[float, Field(strict=False, gt=0, le=3600)] = 60.0
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 1000
    drain_s: Annotated[float, Field(strict=False, gt=0, le=86_400)] = 300.0
    max_connections: Annotated[int, Field(ge=1, le=100_000)] = 1000
    max_forwards: Annotated[int, Field(ge=1, le=100_000)] = 4096
    buffer_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 34)] = 64 << 20
    tls_cert: Annotated[Path | None, Field(strict=False)] = None
    tls_key: Annotated[Path | None, Field(strict=False)] = None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        return self
