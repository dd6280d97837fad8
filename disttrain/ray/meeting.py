"""Where the ranks of a job meet that Ray has started: at a port of rank 0's node, with a secret that Ray carries."""

import secrets
import socket

from disttrain import env


def held_port() -> tuple[socket.socket, str]:
    """Return a socket and its ``host:port``: bound, and not listening, it keeps the port until rank 0 listens there."""
    import ray

    port = socket.socket()
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    address = ray.util.get_node_ip_address()
    port.bind((address, 0))
    return port, f"{address}:{port.getsockname()[1]}"


def meeting(address: str) -> dict[str, str]:
    """Return the variables by which the ranks of one job find each other, where rank 0 listens at `address`."""
    return {env.TRANSPORT: "tcp", env.RENDEZVOUS: address, env.SECRET: secrets.token_hex(32)}


def place(rank: int, world_size: int, local_rank: int, local_size: int) -> dict[str, str]:
    """Return the variables that tell a rank its place."""
    names = (env.RANK, env.WORLD_SIZE, env.LOCAL_RANK, env.LOCAL_SIZE)
    return dict(zip(names, map(str, (rank, world_size, local_rank, local_size)), strict=True))
