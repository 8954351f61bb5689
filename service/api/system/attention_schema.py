"""The wire type of POST /v1/attention."""

from __future__ import annotations

from pydantic import Field

from service.api.fields import TokenIds
from service.api.openai.schema import TokenizeBody


class AttentionBody(TokenizeBody):
    """The body of POST /v1/attention: what /tokenize takes, or token ids; and which weights."""

    tokens: TokenIds | None = Field(
        None, description="Token ids, instead of a prompt or messages: an answer as it came."
    )
    layer: int | None = Field(
        None, ge=0, description="One layer, from 0. Default: the mean of all."
    )
    head: int | None = Field(None, ge=0, description="One head, from 0. Default: the mean of all.")
    positions: TokenIds | None = Field(
        None, description="The tokens, from 0, whose rows are given. Default: all of them."
    )
