"""litellm and llama-index: embeddings, by one text and by many; and litellm's rerank."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
import pytest
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

TEXTS = ["A cat sleeps.", "The kitten naps on the sofa.", "Basalt is a dark volcanic rock."]
QUESTION = "What is basalt?"


def similarity(one: list[float], other: list[float]) -> float:
    """Of vectors of length 1."""
    return sum(a * b for a, b in zip(one, other, strict=True))


@pytest.mark.proves("litellm")
def test_litellm_embeds(encoder: Any) -> None:
    asked: Any = {
        "model": f"openai/{encoder.model}",
        "api_base": encoder.openai_url,
        "api_key": "none",
        "max_retries": 0,
    }
    reply = litellm.embedding(input=TEXTS, **asked)
    vectors = [item["embedding"] for item in reply.data]
    assert [len(vector) for vector in vectors] == [384] * 3
    assert similarity(vectors[0], vectors[1]) > 0.4 > similarity(vectors[0], vectors[2])
    assert reply.usage.prompt_tokens > 15
    alone = asyncio.run(litellm.aembedding(input=[TEXTS[1]], **asked))
    assert alone.data[0]["embedding"] == vectors[1]
    with pytest.raises(litellm.exceptions.BadRequestError, match=r"empty"):
        litellm.embedding(input=[""], **asked)


@pytest.mark.proves("litellm")
def test_litellm_reranks(encoder: Any) -> None:
    """As it asks Cohere and Jina, and as it asks vLLM."""
    for provider, base in (
        ("cohere", encoder.url),
        ("jina_ai", encoder.openai_url),
        ("hosted_vllm", encoder.openai_url),
    ):
        reply = litellm.rerank(
            model=f"{provider}/{encoder.model}",
            query=QUESTION,
            documents=TEXTS,
            top_n=2,
            api_base=base,
            api_key="none",
        )
        results = reply.results or []
        assert len(results) == 2
        assert results[0]["index"] == 2, provider
        assert results[0]["relevance_score"] > results[1]["relevance_score"]


@pytest.mark.proves("llama-index")
def test_llama_index_embeds(encoder: Any) -> None:
    model = OpenAILikeEmbedding(
        model_name=encoder.model,
        api_base=encoder.openai_url,
        api_key="none",
        embed_batch_size=2,
        max_retries=0,
    )
    texts = model.get_text_embedding_batch(TEXTS)
    assert texts[2] == model.get_text_embedding(TEXTS[2])
    query = model.get_query_embedding(QUESTION)
    scores = [model.similarity(query, text) for text in texts]
    assert scores.index(max(scores)) == 2
    assert asyncio.run(model.aget_query_embedding(QUESTION)) == query
