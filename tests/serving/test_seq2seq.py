"""`quire tune seq2seq` writes a folder that `quire serve` answers from as the network does."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch

from model.checkpoint import load_model
from model.encoder_decoder import EncoderDecoder
from model.text.tokenizer import Tokenizer
from tests.conftest import default, serving
from tests.support.translators import train_translator
from tests.support.waiting import PATIENCE


def greedy(folder: Path, source: str, begun: str, num: int) -> str:
    """The answer by the network alone, without a cache."""
    loaded, tokenizer = load_model(folder), Tokenizer.from_checkpoint(folder)
    network = EncoderDecoder(loaded.config)
    network.load_state_dict(loaded.weights)
    sources = torch.tensor([*tokenizer.encode(source), loaded.config.end_id])
    tokens = [*loaded.config.start_ids, *tokenizer.encode(begun)]
    first = len(tokens)
    with torch.no_grad():
        for _ in range(num):
            logits = network.logits(network.translate(torch.tensor(tokens), sources)[-1:])
            tokens.append(int(logits.argmax()))
    return tokenizer.decode(tokens[first:])


def their_logprobs(folder: Path, source: str, num: int) -> list[float]:
    """Of the tokens of the greedy answer, as transformers computes them from the same folder."""
    from transformers import AutoModelForSeq2SeqLM

    network = AutoModelForSeq2SeqLM.from_pretrained(str(folder))
    ids = Tokenizer.from_checkpoint(folder).encode(source)
    sources = torch.tensor([[*ids, network.config.eos_token_id]])
    tokens, found = [network.config.decoder_start_token_id], []
    with torch.no_grad():
        for _ in range(num):
            begun = torch.tensor([tokens])
            logits = network(input_ids=sources, decoder_input_ids=begun).logits[0, -1]
            best = logits.log_softmax(-1).max(-1)
            tokens.append(int(best.indices))
            found.append(float(best.values))
    return found


@pytest.mark.slow
def test_a_translator_is_served(tmp_path: Path) -> None:
    """The answers to two sources at once, one of them streamed, are those of the network; what an
    encoder-decoder has no answer to is refused in one line.
    """
    folder = train_translator(tmp_path)
    options = (*default(folder), "--runner", "torch", "--dtype", "float32")
    body = {"model": options[1], "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    sources = ["5 May 1990", "twelve"]
    with serving(*options, log=tmp_path / "log") as url:

        def post(path: str = "completions", **fields: object) -> httpx.Response:
            return httpx.post(f"{url}/v1/{path}", json=body | fields, timeout=PATIENCE)

        whole = post(prompt=sources).json()
        begun = post(prompt=sources[0], decoder_prompt="19").json()
        streamed = post(prompt=sources[1], stream=True).text
        again = post(prompt=sources[0], stream_options=None).json()
        scored_answer = post(prompt=sources[0], logprobs=0).json()["choices"][0]["logprobs"]
        chat = post("chat/completions", messages=[{"role": "user", "content": "5 May"}])
        scored = post(prompt=sources[0], prompt_logprobs=1)
        empty = post(prompt=[[]])
    expected = [greedy(folder, source, "", 12) for source in sources]
    assert [choice["text"] for choice in whole["choices"]] == expected
    assert begun["choices"][0]["text"] == greedy(folder, sources[0], "19", 12)
    expected_logprobs = their_logprobs(folder, sources[0], 12)
    assert scored_answer["token_logprobs"] == pytest.approx(expected_logprobs, abs=1e-3)
    lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line[:5] == "data:"]
    texts = [json.loads(line)["choices"] for line in lines if line != "[DONE]"]
    assert "".join(each[0]["text"] for each in texts if each) == expected[1]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == again["usage"]["prompt_tokens"] - 1, "all but the token that begins the answer"
    for refused, named in ((chat, "encoder-decoder"), (scored, "prompt_logprobs")):
        assert refused.status_code == 400
        assert named in refused.json()["error"]["message"]
    assert empty.status_code == 400
