"""A follower of tensor parallelism, as a process: `python -m model.parallel.follower SOCKET`.

It reads its `Order` from the socket, its number inherited, and lives as long as the leader: at the
socket's end it ends at once, whatever it was doing. Nothing heavy is imported before it looks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue


def main() -> None:
    """A follower's whole life. Exits with 2, and a line to the leader, for what cannot be built."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the leader ends when its answers have
    leader = Connection(int(sys.argv[1]))
    try:
        order = leader.recv_bytes()
    except EOFError:
        sys.exit(1)
    inbox: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(leader, inbox), name="listen", daemon=True).start()
    try:
        _serve(order, leader, inbox)
    except (ValueError, ImportError) as error:
        leader.send_bytes(str(error).encode())
        sys.exit(2)


def _listen(leader: Connection, inbox: SimpleQueue[bytes]) -> None:
    """Hands on what the leader says; there is no life after it."""
    try:
        while True:
            inbox.put(leader.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)  # the main thread may wait for a sum that never comes


def _serve(text: bytes, leader: Connection, inbox: SimpleQueue[bytes]) -> None:
    """Loads, meets the others, follows."""
    import torch
    import torch.distributed as dist

    from model.memory import return_free_memory
    from model.parallel.ranks import LOADED, Order, build_share, device_of, read_share
    from model.parallel.runner import follow
    from model.parallel.shares import connect

    order = Order.from_json(text)
    device = device_of(order)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config, model = read_share(order)
    leader.send_bytes(LOADED)
    group = connect(rank=order.rank, num_ranks=order.num_ranks, port=order.port, device=device)
    runner = build_share(order, config, model, group)
    del model
    return_free_memory()
    follow(runner, group, hear=inbox.get)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
