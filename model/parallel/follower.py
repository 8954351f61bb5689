"""A follower of tensor parallelism, as a process: `python -m model.parallel.follower SOCKET`.

It reads its `RankSpec` from the socket, whose number is inherited, and exits when the socket
closes, whatever it was doing: it does not outlive the leader. Heavy imports come after that check.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue


def main() -> None:
    """Runs a follower. On errors of the build it sends one line to the leader and exits with 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the leader ends when its answers have
    leader = Connection(int(sys.argv[1]))
    try:
        spec = leader.recv_bytes()
    except EOFError:
        sys.exit(1)
    inbox: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(leader, inbox), name="listen", daemon=True).start()
    try:
        _serve(spec, leader, inbox)
    except (ValueError, ImportError) as error:
        leader.send_bytes(str(error).encode())
        sys.exit(2)


def _listen(leader: Connection, inbox: SimpleQueue[bytes]) -> None:
    """Puts the leader's messages into the inbox; exits the process when the socket closes."""
    try:
        while True:
            inbox.put(leader.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)  # the main thread may wait for a sum that never comes


def _serve(text: bytes, leader: Connection, inbox: SimpleQueue[bytes]) -> None:
    """Loads, connects to the other ranks, follows."""
    import torch
    import torch.distributed as dist

    from model.memory import return_free_memory
    from model.parallel.ranks import LOADED, RankSpec, build_share, device_of, read_share
    from model.parallel.runner import follow
    from model.parallel.shares import connect

    spec = RankSpec.from_json(text)
    device = device_of(spec)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config, model = read_share(spec)
    leader.send_bytes(LOADED)
    group = connect(rank=spec.rank, num_ranks=spec.num_ranks, port=spec.port, device=device)
    runner = build_share(spec, config, model, group)
    del model
    return_free_memory()
    follow(runner, group, receive=inbox.get)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
