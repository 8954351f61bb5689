"""Generation: what a client asks for, in no dialect's terms.

A dialect parses its body into a `Generation`; everything after that, from the prompt to the
journal, works on it alone. It holds what the client gave: limits are checked and defaults that
depend on the model are filled in when it is planned (see `plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from service.api.fields import FieldNames
from service.api.structured.output import OutputFormat
from service.api.tools.chat import ChatMessage, ToolUse
from service.messages import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """One prompt or several, each a text or token ids."""

    prompts: tuple[str | tuple[int, ...], ...]
    add_bos: bool = True  # to texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Messages for the model's chat template."""

    messages: tuple[ChatMessage, ...]
    tools: ToolUse | None = None
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request for one answer of one or more choices."""

    model: str
    prompt: Prompts | Chat
    sampling: SamplingParams  # `choice` and `top_logprobs` are set when it is planned
    names: FieldNames  # for error messages

    # --- limits and stop rules ------------------------------------------------------------
    max_tokens: int | None = None  # None: `default_max_tokens`
    default_max_tokens: int | None = None  # cut to the rest of the context; None: all of it
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    # --- choices and what is returned of them -----------------------------------------------
    n: int = 1  # choices returned per prompt
    best_of: int | None = None  # choices generated per prompt; None: n
    logprobs: int | None = None  # top log probabilities per token; None: no log probabilities
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    echo: bool = False  # the answer begins with the prompt
    return_token_ids: bool = False
    output: OutputFormat | None = None  # None: any text

    # --- the stream -------------------------------------------------------------------------
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False

    # --- scheduling -------------------------------------------------------------------------
    priority: int | None = None  # 0 before 1 before 2; None: the default of the client's key
    on_disconnect: Literal["cancel", "continue"] | None = None  # None: as the stream resumes
    echoed: Mapping[str, Any] = field(default_factory=dict)
    """Request fields that the answer repeats. Not empty: the answer is an object with a status,
    which clients can retrieve unless `store` is false; `background` must be given, too.
    """

    @property
    def tools(self) -> ToolUse | None:
        """The tools that the model may call; None: the output is text."""
        return self.prompt.tools if isinstance(self.prompt, Chat) else None
