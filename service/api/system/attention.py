"""POST /v1/attention: the attention of each token of a text to others, by layer and head.

Available only if the network is in this process. It uses neither the queue nor the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Protocol

from fastapi import APIRouter, Response
from pydantic import Field

from service.api.generation.request import check_token_ids
from service.api.http.body import JsonRoute
from service.api.http.context import ApiLimits, Caller, Context, ModelContext
from service.api.http.fields import TokenIds
from service.api.http.models import AnswerModel, ModelId, TokenList, described, json_response
from service.api.http.observer import BUSY, ApiObserver
from service.api.system.models import TokenizeBody, input_ids
from service.errors import BadRequest, NotFound
from service.fair_pool import FairPool

DIGITS = 4  # of a weight: over 512 tokens the mean is 0.002

router = APIRouter(route_class=JsonRoute)


class AttentionReader(Protocol):
    """Reads attention from the network. `read` blocks; any thread may call it."""

    num_layers: int
    num_heads: int

    def read(
        self, tokens: Sequence[int], *, layer: int | None, head: int | None
    ) -> Sequence[Sequence[float]]:
        """Returns each token's weights over the tokens up to itself or, in an encoder, over all.
        None: the mean over all layers, or all heads.
        """
        ...


class AttentionService:
    def __init__(self, reader: AttentionReader, limits: ApiLimits, observer: ApiObserver) -> None:
        self.num_layers = reader.num_layers
        self.num_heads = reader.num_heads
        self._reader = reader
        self._pool = FairPool(
            "attention",
            threads=1,
            max_weight=limits.max_waiting_maps,
            max_tenant_weight=limits.max_tenant_waiting_maps,
            refused=partial(observer.call_refused, BUSY),
        )

    async def read(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        tenant: str,
        layer: int | None,
        head: int | None,
    ) -> list[list[float]]:
        """Returns the rounded rows at `positions`. Raises RateLimited or Unavailable if too many
        calls wait. Cancelling this does not stop a read that has begun.
        """

        def rows() -> list[list[float]]:
            weights = self._reader.read(tokens, layer=layer, head=head)
            return [[round(weight, DIGITS) for weight in weights[at]] for at in positions]

        return await self._pool.run(tenant, rows)

    def close(self) -> None:
        """Cancels the calls that wait."""
        self._pool.close()


class AttentionBody(TokenizeBody):
    """The body of POST /v1/attention: that of /tokenize, or token ids; and which weights."""

    tokens: TokenIds | None = Field(None, description="Token ids, instead of a prompt or messages.")
    layer: int | None = Field(
        None, ge=0, description="One layer, from 0. Default: the mean of all."
    )
    head: int | None = Field(None, ge=0, description="One head, from 0. Default: the mean of all.")
    positions: TokenIds | None = Field(
        None, description="The tokens, from 0, to return rows for. Default: all."
    )


class AttentionMap(AnswerModel):
    """Attention weights."""

    object: Literal["attention"] = Field(description="The type of this object.")
    model: ModelId
    tokens: TokenList
    rows: list[dict[str, Any]] = Field(description="A row of weights per requested token.")


@router.post("/v1/attention", responses=described(AttentionMap))
async def show_attention(body: AttentionBody, context: Context, tenant: Caller) -> Response:
    """The attention weights of each token of a prompt, of messages (through the model's chat
    template) or of token ids, to itself and earlier tokens or, in an encoder, to all: the softmax
    of one layer's head, or the mean over layers and heads. Available if the network is in the
    process (`quire serve`).
    """
    chosen = context.model(body.model)
    service = chosen.served.attention
    if service is None:
        raise NotFound(
            "attention is not available: this replica has no network, or the setting is off",
            code="attention_not_available",
            retryable=False,
        )
    _check_index(body.layer, "layer", service.num_layers)
    _check_index(body.head, "head", service.num_heads)
    tokens = await _tokens(body, chosen, tenant=tenant.name)
    positions = _positions(body, len(tokens))
    rows = await service.read(
        tokens, positions, tenant=tenant.name, layer=body.layer, head=body.head
    )
    texts = [chosen.vocabulary.token_text(token) for token in tokens]
    return json_response({
        "object": "attention",
        "model": chosen.card.id,
        "num_layers": service.num_layers,
        "num_heads": service.num_heads,
        "layer": body.layer,
        "head": body.head,
        "tokens": tokens,
        "token_strs": texts if body.return_token_strs else None,
        "rows": [
            {"position": position, "weights": weights}
            for position, weights in zip(positions, rows, strict=True)
        ],
    })  # fmt: skip


def _check_index(index: int | None, name: str, count: int) -> None:
    if index is not None and index >= count:
        raise BadRequest(f"{name} must be from 0 to {count - 1}", param=name)


async def _tokens(body: AttentionBody, context: ModelContext, *, tenant: str) -> list[int]:
    """Returns the tokens of the input. Raises BadRequest if there are none, or too many."""
    given = {"prompt": body.prompt, "messages": body.messages, "tokens": body.tokens}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise BadRequest(
            "exactly one of prompt, messages and tokens must be given",
            code="missing_required_parameter",
            param="prompt",
        )
    tokens: Sequence[int] | None = body.tokens
    if tokens is None:
        tokens = await input_ids(body, context, tenant=tenant)
    limit = min(context.limits.max_attention_tokens, context.card.max_model_len)
    if not 1 <= len(tokens) <= limit:
        raise BadRequest(
            f"attention is shown for 1 to {limit} tokens",
            code="context_length_exceeded" if tokens else "empty_prompt",
            param=names[0],
        )
    check_token_ids(tokens, context, param=names[0])
    return list(tokens)


def _positions(body: AttentionBody, length: int) -> list[int]:
    """Returns the positions of the rows, sorted and unique."""
    if body.positions is None:
        return list(range(length))
    if not body.positions or not 0 <= min(body.positions) <= max(body.positions) < length:
        raise BadRequest(
            f"positions must be at least one, each from 0 to {length - 1}", param="positions"
        )
    return sorted(set(body.positions))
