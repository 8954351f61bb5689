"""langchain-openai: LangChain's own standard suite for embeddings, in its own encoding."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests


@pytest.mark.proves("langchain-openai")
class TestEmbeddings(EmbeddingsIntegrationTests):
    """Texts are sent as texts: the default sends the token ids of OpenAI's vocabulary."""

    @pytest.fixture(autouse=True)
    def _use(self, encoder: Any) -> None:
        self.encoder = encoder

    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {
            "model": self.encoder.model,
            "base_url": self.encoder.openai_url,
            "api_key": "none",
            "check_embedding_ctx_length": False,
        }
