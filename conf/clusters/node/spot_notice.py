"""Tell Ray when the cloud takes this spot machine back, so that work on it saves and moves on.

    python spot_notice.py --cloud aws --address HEAD:6379 &

Started beside `ray start` on every spot node (see cluster.yaml); needs Ray and nothing of bar_ray.
The clouds announce it through their metadata servers only: AWS two minutes before, Google thirty
seconds. The node is then drained: nothing new starts there, and trainings learn of the deadline.
"""

import argparse
import json
import socket
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime

POLL_S = 2.0
GOOGLE_S = 30.0
METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}


def aws_deadline(server: str) -> float | None:
    """When this machine goes, in epoch seconds; None as long as it stays.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _ask(f"{server}/latest/api/token", lifetime, "PUT")
    mine = {"X-aws-ec2-metadata-token": token or ""}
    notice = _ask(f"{server}/latest/meta-data/spot/instance-action", mine)
    if notice is None:
        return None
    return datetime.fromisoformat(json.loads(notice)["time"]).timestamp()


def gcp_deadline(server: str) -> float | None:
    """The same for Google: https://cloud.google.com/compute/docs/instances/spot"""
    url = f"{server}/computeMetadata/v1/instance/preempted"
    taken = _ask(url, {"Metadata-Flavor": "Google"})
    return time.time() + GOOGLE_S if taken and taken.strip().upper() == "TRUE" else None


DEADLINES = {"aws": aws_deadline, "gcp": gcp_deadline}


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer; None when there is nothing of that name."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def drain(address: str, node_id: str, deadline: float) -> None:
    """Let Ray know that a node goes at `deadline`."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = GcsClient(address=address)
    accepted, why = client.drain_node(node_id, reason, "spot notice", int(deadline * 1000))
    if not accepted:
        raise RuntimeError(f"Ray does not drain {node_id}: {why}")


def node_here(address: str) -> str:
    """The id of this machine's living Ray node."""
    from ray._raylet import GcsClient

    ours = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    probe.connect((address.rpartition(":")[0], 9))  # sends nothing: finds the way to the head
    ours.add(probe.getsockname()[0])
    for node in GcsClient(address=address).get_all_node_info().values():
        if node.node_manager_address in ours and node.state == 0:  # ALIVE
            return node.node_id.hex()
    raise RuntimeError(f"no Ray node at {sorted(ours)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cloud", choices=sorted(DEADLINES), required=True)
    parser.add_argument("--address", required=True, help="of the head: HOST:PORT")
    parser.add_argument("--node-id", default="", help="another node than this machine's")
    parser.add_argument("--metadata", default="", help="another metadata server than the cloud's")
    args = parser.parse_args()
    server = args.metadata or METADATA[args.cloud]
    while True:
        try:
            deadline = DEADLINES[args.cloud](server)
            if deadline is not None:
                drain(args.address, args.node_id or node_here(args.address), deadline)
                left = deadline - time.time()
                return print(f"spot notice: this machine goes in {left:.0f} s; draining")
        except Exception as error:  # whatever it is, the next notice must not be missed
            print(f"spot_notice: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
