"""A vocabulary with more tokens than the embedding has rows: such a token is a 400."""

from __future__ import annotations

from typing import Any

import pytest

from model.text.tokenizer import Tokenizer

TEXT = {"model": "tiny-model", "prompt": "hello world", "max_tokens": 2}
CHAT = {"model": "tiny-model", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
MESSAGE = {**CHAT, "max_tokens": 2}
RESPONSE = {"model": "tiny-model", "input": "a", "max_output_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", TEXT, "prompt"),
        ("/v1/chat/completions", CHAT, "messages"),
        ("/v1/responses", RESPONSE, "input"),
        ("/v1/messages", MESSAGE, "messages"),
    ],
)
async def test_a_token_beyond_the_embedding_is_refused(
    start_service: Any, tokenizer: Tokenizer, path: str, body: dict[str, Any], field: str
) -> None:
    """It reached the engine, which ended the answer with an error after it was accepted."""
    ids = tokenizer.encode("hello world")
    first_special = tokenizer.special_id("<|im_start|>")
    assert first_special is not None
    rows = max(ids) if path == "/v1/completions" else first_special
    async with start_service(vocab_size=rows) as service:
        refused = await service.post(path, body)
        assert refused.status_code == 400, refused.text
        assert f"from 0 to {rows - 1}" in refused.json()["error"]["message"]
        if path != "/v1/messages":
            assert refused.json()["error"]["code"] == "invalid_token_id"
            assert refused.json()["error"]["param"] == field
        assert not service.engine.seen
    async with start_service(vocab_size=rows + 3) as service:
        assert (await service.post(path, body)).status_code == 200
