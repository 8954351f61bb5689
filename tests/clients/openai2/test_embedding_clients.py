"""llama-index and litellm: embeddings, and litellm's reranking."""

from __future__ import annotations

import math
from typing import Any

import litellm
import pytest
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

TEXTS = ["A cat sleeps.", "The kitten naps on the sofa.", "Basalt is a dark volcanic rock."]


def cosine(a: list[float], b: list[float]) -> float:
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def check_order(vectors: list[list[float]]) -> None:
    """The texts about cats are closer to each other than to the third one."""
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.2


@pytest.mark.proves("llama-index")
def test_llama_index_embeds(encoder: Any) -> None:
    model = OpenAILikeEmbedding(
        model_name=encoder.model, api_base=encoder.openai_url, api_key="none", max_retries=0
    )
    vectors = model.get_text_embedding_batch(TEXTS)
    check_order(vectors)
    assert model.get_query_embedding(TEXTS[0]) == vectors[0]


@pytest.mark.proves("litellm")
def test_litellm_embeds_and_reranks(encoder: Any) -> None:
    reply = litellm.embedding(
        model=f"openai/{encoder.model}", input=TEXTS, api_base=encoder.openai_url, api_key="none"
    )
    check_order([each["embedding"] for each in reply.data])
    ranked = litellm.rerank(
        model=f"cohere/{encoder.model}", query="a cat", documents=TEXTS, top_n=2,
        api_base=encoder.url, api_key="none",
    )  # fmt: skip
    assert ranked.results[0]["index"] in {0, 1}
    assert len(ranked.results) == 2
