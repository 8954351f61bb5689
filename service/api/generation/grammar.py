"""The grammar of a request's output: of its output format, of its tools, or of both."""

from __future__ import annotations

from functools import partial

from service.api.context import ApiContext
from service.api.generation.request import Generation
from service.api.structured.grammar import output_grammar
from service.api.structured.output import JsonOutput
from service.api.tools.formats import TOOL_FORMATS, tool_format_name
from service.api.tools.grammar import validated_tools_grammar
from service.errors import BadRequest


async def grammar_of(generation: Generation, context: ApiContext, *, tenant: str) -> str | None:
    """In `model.grammar`'s notation, validated; None: any text. Raises BadRequest, RateLimited or
    Unavailable.
    """
    output, tools, names = generation.output, generation.tools, generation.names
    if output is None and tools is None:
        return None
    _reject_conflicting_fields(generation)
    validate = partial(context.grammars.error, tenant=tenant)
    if tools is not None:
        tool_format = TOOL_FORMATS[tool_format_name(context.tokenizer)]
        marker_ids = tool_format.marker_ids(context.tokenizer)
        json = output if isinstance(output, JsonOutput) else None
        return await validated_tools_grammar(
            tools, tool_format, marker_ids, validate, output=json, names=names
        )
    return None if output is None else await output_grammar(output, validate, names=names)


def _reject_conflicting_fields(generation: Generation) -> None:
    """Stop strings and stop tokens are no conflict: they cut the output, as the limit does."""
    conflicts = {"min_tokens": generation.min_tokens, "ignore_eos": generation.ignore_eos}
    for name, given in conflicts.items():
        if given:
            raise BadRequest(
                f"{name} contradicts a grammar, which determines the end of the output", param=name
            )
