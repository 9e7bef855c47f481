"""Where the workers of a group meet for torch.distributed: an address of rank 0, and the variables that name it."""

from __future__ import annotations

import os
import socket

import psutil


class Meeting:
    """A free port of this machine, held until `release`.

    The socket is bound but never listens, so a server that sets SO_REUSEADDR (as torch's store does) can take the port
    while it is held, and the kernel gives it to nobody else.
    """

    def __init__(self, host: str) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("", 0))
        self.address: tuple[str, int] = (host, self._socket.getsockname()[1])

    def release(self) -> None:
        """Gives the port up; may be called again."""
        self._socket.close()


def environment(address: tuple[str, int], *, rank: int, size: int, local: tuple[int, int], node: str) -> dict[str, str]:
    """The variables that torch.distributed and DeepSpeed read.

    Args:
        address: host and port of rank 0.
        rank: this worker's rank.
        size: number of workers.
        local: local rank and number of local ranks. Libraries take the local rank for the number of the process's GPU
            among those that it sees; a worker that has a GPU sees that one alone, and is (0, 1).
        node: this machine's address, whose interface gloo is to use.
    """
    host, port = address
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local[0]),
        "LOCAL_WORLD_SIZE": str(local[1]),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
    interface = _interface(node)
    # Without it gloo looks up the host's own name, which fails where the name has no address.
    if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        variables["GLOO_SOCKET_IFNAME"] = interface
    return variables


def _interface(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None
