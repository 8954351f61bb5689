"""Tensor parallelism: the ranks' shares add up to the network, and two processes answer as one."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Batch
from model.config import ModelConfig, Norm, Position
from model.kernels.matmul import Product, multiply
from model.parallel.runner import follow, lead
from model.parallel.shares import connect, share_config, sum_over, sum_sublayers
from model.parallel.wire import decode, encode
from model.runners import RunnerOptions
from model.transformer import Transformer
from tests.support.builders import Piece, make_batch, tiny_model_config, tiny_weights
from tests.support.waiting import PATIENCE
from tests.support.weights import share_weights

BIASES: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biased": {**BIASES, "qk_norm": True},
    "gpt2": {**BIASES, "norm": Norm.LAYER, "position": Position.LEARNED, "gated_mlp": False},
}


def network_of(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Transformer:
    network = Transformer(config)
    network.load_state_dict(weights)
    return network.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shares_of_a_sublayer_add_up(kind: str) -> None:
    """Attention and MLP of each rank, summed, are the whole ones."""
    config = tiny_model_config(**KINDS[kind])
    weights = tiny_weights(config)
    whole = network_of(config, weights)
    ranks = [
        network_of(
            share_config(config, num_ranks=2),
            share_weights(config, weights, rank=rank, num_ranks=2),
        )
        for rank in range(2)
    ]
    torch.manual_seed(0)
    summands: list[torch.Tensor] = []
    for rank in ranks:
        sum_sublayers(rank, lambda x: summands.append(x) or x)  # type: ignore[func-returns-value]
    tokens = torch.randint(97, (7,))
    inputs: list[torch.Tensor] = []
    for block in whole.blocks:
        for sublayer in (block.attention, block.mlp):
            assert isinstance(sublayer, torch.nn.Module)
            sublayer.register_forward_hook(lambda _m, _i, output: inputs.append(output))
    whole(tokens)
    for rank in ranks:
        rank(tokens)
    first = summands[0] + summands[len(summands) // 2]
    torch.testing.assert_close(first, inputs[0], atol=1e-5, rtol=1e-5)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="num_kv_heads 2"):
        share_config(tiny_model_config(), num_ranks=4)


def batch_of(length: int) -> Batch:
    sampling = {"temperature": 0.8, "seed": 3, "logprobs": True}
    return make_batch(
        [
            Piece(tokens=list(range(length)), count=length, blocks=[5, 1], sampling=sampling),
            Piece(tokens=[4], blocks=[2]),
        ],
        num_top=2,
    )


@pytest.mark.parametrize("unread", [None, np.array([True, False, True])])
def test_a_batch_travels_whole(unread: np.ndarray[Any, Any] | None) -> None:
    batch = batch_of(2)
    given, mask = decode(encode(batch, unread))
    assert encode(given, mask) == encode(batch, unread)
    given.check(block_size=4, num_blocks=8, vocab_size=97)
    assert given.sampling.num_top == 2
    assert (mask is None) == (unread is None)


class Other:
    """The other rank, at the end of a pipe."""

    def __init__(self, connection: Connection) -> None:
        self.send = self.send_last = connection.send_bytes

    def check(self, *, timeout: float = 0.0) -> None:
        pass

    def close(self) -> None:
        pass


def rank_of(
    rank: int, port: int, work: Callable[..., Any], results: Queue[Any], connection: Connection
) -> None:
    """A process's whole life."""
    torch.set_num_threads(1)
    try:
        group = connect(
            rank=rank, num_ranks=2, port=port, device=torch.device("cpu"), timeout=PATIENCE
        )
        results.put((rank, work(rank, group, connection)))
    except Exception:  # noqa: BLE001 - whatever it was, the test shall show it
        results.put((rank, traceback.format_exc()))
    finally:
        torch.distributed.destroy_process_group()


def logits_of_rank(rank: int, group: torch.distributed.ProcessGroup, _: Connection) -> list[Any]:
    config = tiny_model_config(**KINDS["biased"])
    shared = share_weights(config, tiny_weights(config), rank=rank, num_ranks=2)
    network = network_of(share_config(config, num_ranks=2), shared)
    sum_sublayers(network, sum_over(group))
    logits: list[Any] = network(torch.arange(9)).tolist()
    return logits


def runner_of(config: ModelConfig, rank: int, reduce: Any, *, num_ranks: int) -> Any:
    from model.runners.cuda.build import build_runner

    shared = share_weights(config, tiny_weights(config), rank=rank, num_ranks=num_ranks)
    return build_runner(
        share_config(config, num_ranks=num_ranks),
        shared,
        options=RunnerOptions(
            dtype="float32", device="cpu", block_size=8, num_blocks=8, max_sequences=4,
            max_batch_tokens=32,
        ),
        digest="0" * 64,
        reduce=reduce,
        check=None,
    )  # fmt: skip


def tokens_of_rank(
    rank: int, group: torch.distributed.ProcessGroup, connection: Connection
) -> list[int]:
    config = tiny_model_config(max_model_len=64)
    local = runner_of(config, rank, sum_over(group), num_ranks=2)
    if rank:
        follow(local, group, receive=connection.recv_bytes)
        return []
    runner = lead(local, group, config=config, followers=Other(connection))
    assert hasattr(runner, "launch")
    tokens: list[int] = runner.run(batch_of(10)).tokens_R.tolist()
    runner.close()
    assert "tp2" in runner.numeric_class
    return tokens


class TimedBlas:
    """Our own product; it says of itself that it is so many times as fast."""

    alignment = 1

    def __init__(self, speed: float) -> None:
        self._times = [1.0, 1 / speed]

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return multiply(x, weight, bias)

    def seconds(self, work: Callable[[], object]) -> float:
        self._times.reverse()
        return self._times[1]


def verified_by_rank(
    rank: int, group: torch.distributed.ProcessGroup, _: Connection
) -> tuple[list[int], int]:
    """Shapes that vendor BLAS multiplies on a rank whose clock is its own, and a later sum."""
    from model.runners.cuda.build import build_runner

    config = tiny_model_config(max_model_len=64)
    reduce = sum_over(group)
    runner = build_runner(
        share_config(config, num_ranks=2),
        share_weights(config, tiny_weights(config), rank=rank, num_ranks=2),
        options=RunnerOptions(
            dtype="float32", device="cpu", block_size=8, max_sequences=2, max_batch_tokens=8,
            kv_memory=2**16, vendor_blas=True,
        ),
        digest="0" * 64,
        reduce=reduce,
        blas=TimedBlas((2.0, 0.5)[rank]),
    )  # fmt: skip
    shapes = sorted(shape.outputs for shape in runner.vendor_blas_shapes)
    return shapes, int(reduce(torch.tensor([10 + rank])))


def two_ranks(work: Callable[..., Any]) -> dict[int, Any]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = get_context("spawn")
    results: Queue[Any] = context.Queue()
    processes = [
        context.Process(target=rank_of, args=(rank, port, work, results, connection))
        for rank, connection in enumerate(context.Pipe())
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=4 * PATIENCE) for _ in processes)
    for process in processes:
        process.join()
    return found


@pytest.mark.kernels
def test_two_processes_have_the_logits_of_one() -> None:
    config = tiny_model_config(**KINDS["biased"])
    expected = network_of(config, tiny_weights(config))(torch.arange(9)).numpy()
    found = two_ranks(logits_of_rank)
    for rank in range(2):
        np.testing.assert_allclose(np.array(found[rank]), expected, atol=1e-4)


@pytest.mark.kernels
def test_two_processes_choose_the_tokens_of_one() -> None:
    alone = runner_of(tiny_model_config(max_model_len=64), 0, None, num_ranks=1)
    found = two_ranks(tokens_of_rank)
    assert found[0] == alone.run(batch_of(10)).tokens_R.tolist()
    assert found[1] == []


@pytest.mark.kernels
def test_ranks_decide_together_which_products_vendor_blas_computes() -> None:
    """It is faster on one rank alone. Each decided for itself, then measured its largest steps:
    more of them if vendor BLAS was used, so the ranks' sums no longer met.
    """
    assert two_ranks(verified_by_rank) == {0: ([], 21), 1: ([], 21)}
