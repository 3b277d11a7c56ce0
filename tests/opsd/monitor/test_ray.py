"""Which gauge a metric becomes. That a run really exports them is tests/integration/test_monitoring.py's matter."""

import pytest

from opsd.monitor.ray import gauge_of


@pytest.mark.parametrize(
    ("metric", "gauge", "labels"),
    [
        ("loss", "opsd_loss", {}),
        ("eval/reverse_kl", "opsd_eval_reverse_kl", {}),
        ("queue/rollouts", "opsd_queue_rollouts", {}),
        ("phase_s/learn", "opsd_phase_seconds", {"phase": "learn"}),
        ("quadrant_3", "opsd_quadrant_ratio", {"quadrant": "3"}),
        ("kept_quadrant_3", "opsd_kept_quadrant_ratio", {"quadrant": "3"}),
        ("dropped", "opsd_dropped", {}),
        ("dropped/nan_score", "opsd_dropped_by_reason", {"reason": "nan_score"}),
        ("my method's own-metric", "opsd_my_method_s_own_metric", {}),
    ],
)
def test_a_metric_has_a_name_that_prometheus_takes(metric, gauge, labels):
    assert gauge_of(metric) == (gauge, labels)
