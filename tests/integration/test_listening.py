"""A run's own Ray node listens on this machine alone: its metrics and the store of its actors ask for no token."""

import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Prints where each process of a node with an actor listens: its name and the address.
NODE = """
import json, time
import psutil, ray
from opsd.cluster.ray import ray_cluster, start_actor

class Actor:
    def here(self):
        return ray.util.get_node_ip_address()

with ray_cluster(dashboard=True) as url:
    actor = start_actor(Actor, "actor", num_gpus=0, environment={})
    address = ray.get(actor.here.remote())
    own = psutil.Process()
    found = []
    for process in [own, *own.children(recursive=True)]:
        sockets = [each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
        found += [(process.name(), each.laddr.ip) for each in sockets]
    print(json.dumps({"url": url, "address": address, "found": found}))
"""


@pytest.mark.slow
def test_every_port_of_a_runs_own_ray_is_on_the_loopback_address():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", NODE], env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    said = json.loads(process.stdout.splitlines()[-1])
    assert {"raylet", "gcs_server"} <= {name for name, _ in said["found"]}, said
    assert said["address"] == "127.0.0.1" and said["url"].startswith("http://127.0.0.1:")
    plain = [(name, ip.removeprefix("::ffff:")) for name, ip in said["found"]]  # an IPv4 address on an IPv6 socket
    assert [each for each in plain if not ipaddress.ip_address(each[1]).is_loopback] == []
