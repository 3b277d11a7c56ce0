"""What a teacher server counts, in Prometheus' format."""

from __future__ import annotations

from typing import TypedDict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _Shared(TypedDict):
    """What all of a server's metrics have in common."""

    namespace: str
    subsystem: str
    registry: CollectorRegistry


class ServerMetrics:
    """One registry a server, so that two in one process do not share their counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: _Shared = {"namespace": "opsd", "subsystem": "teacher", "registry": self._registry}
        self.requests = Counter("requests", "requests answered with 200", ["endpoint"], **own)
        self.refusals = Counter("refusals", "requests answered with another status", ["endpoint", "status"], **own)
        self.rollouts = Counter("rollouts", "rollouts scored, or prompts answered", ["endpoint"], **own)
        self.tokens = Counter("tokens", "prompt and response tokens of answered requests", ["endpoint"], **own)
        self.latency = Histogram(
            "request_seconds", "from a whole request to its answer", ["endpoint"], buckets=SECONDS, **own
        )
        self.batch = Histogram(
            "batch_requests", "requests that one call of the engine answered", buckets=(1, 2, 4, 8, 16, 32, 64), **own
        )
        self.ready = Gauge("ready", "1 while the engine answers", **own)
        self.connections = Gauge("connections", "open connections", **own)
        self.dropped = Counter("dropped_connections", "connections that the server ended", ["reason"], **own)
        self.held_bytes = Gauge("held_bytes", "of the bodies of requests under way", **own)
        self.queue_length = Gauge("queue_length", "requests that wait for the engine", **own)

    def page(self) -> bytes:
        return generate_latest(self._registry)
