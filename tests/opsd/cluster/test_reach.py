"""The printed addresses say from where they can be opened."""

import pytest

from opsd.cluster.reach import reach, reachable_lines


def test_the_dashboard_is_on_this_machine_and_the_metrics_are_not():
    assert reachable_lines("http://127.0.0.1:8265", "http://10.0.0.7:44217/metrics") == [
        "ray     http://127.0.0.1:8265 (from this machine only; from yours: ssh -L 8265:127.0.0.1:8265 THIS_MACHINE, "
        "then the same address; its token: ray get-auth-token)",
        "metrics http://10.0.0.7:44217/metrics (from every machine that reaches this one; for Prometheus)",
    ]
    assert reachable_lines("", "http://127.0.0.1:1/metrics")[0] == "ray     no dashboard"


@pytest.mark.parametrize(
    ("host", "here_only"),
    [("localhost", True), ("127.0.0.1", True), ("127.0.1.1", True), ("[::1]", True), ("192.168.1.4", False),
     ("node-7", False), ("0.0.0.0", False)],
)  # fmt: skip
def test_only_a_loopback_address_is_for_this_machine_alone(host, here_only):
    assert reach(f"http://{host}:80").startswith("from this machine only") == here_only
