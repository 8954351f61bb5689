"""openai: embeddings in both encodings, by either of its versions."""

from __future__ import annotations

import struct
from typing import Any

import openai
import pytest

CLIENT = f"openai {openai.__version__.partition('.')[0]} (Python)"
TEXTS = ["A cat sleeps.", "The kitten naps on the sofa.", "Basalt is a dark volcanic rock."]


@pytest.mark.proves(CLIENT)
def test_both_encodings_have_the_same_bits(encoder: Any) -> None:
    with openai.OpenAI(base_url=encoder.openai_url, api_key="none", max_retries=0) as client:
        packed = client.embeddings.create(model=encoder.model, input=TEXTS)  # base64
        plain = client.embeddings.create(
            model=encoder.model, input=TEXTS, encoding_format="float", user="me"
        )
        short = client.embeddings.create(model=encoder.model, input=TEXTS[0], dimensions=8)
        with pytest.raises(openai.BadRequestError, match="truncate_prompt_tokens"):
            client.embeddings.create(model=encoder.model, input="word " * 1000)
    for one, other in zip(packed.data, plain.data, strict=True):
        bits = [struct.pack("384f", *each.embedding) for each in (one, other)]
        assert bits[0] == bits[1]
    assert packed.usage.total_tokens == packed.usage.prompt_tokens > 20
    assert len(short.data[0].embedding) == 8
