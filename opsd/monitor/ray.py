"""The numbers of metrics.jsonl as Ray metrics: what Prometheus reads and Grafana shows.

Ray's agent on this machine serves them beside its own at `metrics_url()`, with `ray_` before every name:
`ray_opsd_loss{run="quickstart"}`. docker/prometheus.yml finds the agents of all nodes by itself.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import ray
from ray.util.metrics import Gauge

from opsd.monitor.jsonl import finite_or_null
from opsd.monitor.warned import Warned

# A metric whose name has such a form is one series of a gauge that several metrics share; the group is its label.
FAMILIES = (
    (re.compile(r"phase_s/(?P<phase>\w+)"), "opsd_phase_seconds"),
    (re.compile(r"idle_s/(?P<role>\w+)"), "opsd_idle_seconds"),
    (re.compile(r"quadrant_(?P<quadrant>[1-4])"), "opsd_quadrant_ratio"),
    (re.compile(r"kept_quadrant_(?P<quadrant>[1-4])"), "opsd_kept_quadrant_ratio"),
    (re.compile(r"dropped/(?P<reason>\w+)"), "opsd_dropped_by_reason"),
)
REFRESH_S = 5.0  # Ray forgets a gauge that is not set again within two of its report intervals, 10 s each by default


class RayMetrics:
    """Gauges that show the newest value of every metric until the run ends, however long a step takes."""

    def __init__(self, run_name: str, warned: Warned) -> None:
        """`run_name`: the label by which runs on one cluster are told apart."""
        self._run_name = run_name
        self._optional = warned.optional
        self._gauges: dict[str, Gauge] = {}
        self._newest: dict[str, float] = {}  # by metric
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._refresher = threading.Thread(target=self._refresh, name="ray-metrics", daemon=True)
        self._refresher.start()

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl. A metric that is None now is no longer shown; one that is absent stays."""
        with self._lock:
            self._newest.update(finite_or_null(record))
            self._newest = {metric: value for metric, value in self._newest.items() if value is not None}
            self._set()

    def close(self) -> None:
        self._closing.set()
        self._refresher.join()

    def _refresh(self) -> None:
        while not self._closing.wait(REFRESH_S):
            with self._optional("Ray's metrics"), self._lock:
                self._set()

    def _set(self) -> None:
        for metric, value in self._newest.items():
            name, labels = gauge_of(metric)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, f"{metric} of metrics.jsonl", tag_keys=("run", *labels))
            self._gauges[name].set(value, {"run": self._run_name, **labels})


def gauge_of(metric: str) -> tuple[str, dict[str, str]]:
    """A metric's gauge and its labels. phase_s/learn -> opsd_phase_seconds, {phase: learn}; loss -> opsd_loss, {}."""
    for form, gauge in FAMILIES:
        if found := form.fullmatch(metric):
            return gauge, found.groupdict()
    return "opsd_" + re.sub(r"\W", "_", metric), {}


def metrics_url() -> str:
    """Where Ray's agent on this node serves the metrics of this run, and Ray's own, in Prometheus' format."""
    here = ray.get_runtime_context().get_node_id()
    [node] = [node for node in ray.nodes() if node["NodeID"] == here]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
