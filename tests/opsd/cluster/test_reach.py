"""The printed addresses say from where they can be opened."""

import socket
import threading

import pytest

from opsd.cluster.reach import reach, reachable_lines, require_answer
from opsd.errors import StageError


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


def test_a_cluster_that_is_not_there_is_named_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(StageError, match=f"nothing answers at RAY_ADDRESS=127.0.0.1:{port} .*refused"):
        require_answer(f"127.0.0.1:{port}", wait_s=0.1)
    with pytest.raises(StageError, match="nothing answers at RAY_ADDRESS=no-such-host.invalid:6379"):
        require_answer("no-such-host.invalid:6379", wait_s=0.1)
    with pytest.raises(StageError, match="nothing answers at RAY_ADDRESS=127.0.0.1:70000"):
        require_answer("127.0.0.1:70000", wait_s=0.1)


def test_a_cluster_that_is_still_starting_is_waited_for():
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        starts = threading.Timer(0.7, late.listen)
        starts.start()
        require_answer(f"127.0.0.1:{late.getsockname()[1]}", wait_s=30)
        starts.join()


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "local"])
def test_what_ray_looks_up_itself_is_left_to_it(address):
    require_answer(address)
