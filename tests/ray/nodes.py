"""`python -m tests.ray.nodes CPUS...`: a cluster of a node for each number of CPUs, the first its head.

It prints its address; for each line that it reads it kills the last node, and says so; it ends with its input.
"""

import sys

from ray.cluster_utils import Cluster


def main(cpus):
    each = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], **each})
    nodes = [cluster.add_node(num_cpus=count, **each) for count in cpus[1:]]
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        print("removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]])
