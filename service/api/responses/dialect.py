"""OpenAI's responses as a dialect."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from service.api.errors import error_body
from service.api.generation.accumulate import Accumulator
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader
from service.api.responses.object import response_object, status_of
from service.api.responses.parse import NAMES, parse_response
from service.api.responses.stream import ResponseRenderer


class Responses:
    """See `Dialect`."""

    name = Endpoint.RESPONSES
    path = "/v1/responses"
    names = NAMES
    id_headers: Sequence[bytes] = ()

    parse = staticmethod(parse_response)
    stream = staticmethod(ResponseRenderer)
    error = staticmethod(error_body)

    def collect(self, reader: AnswerReader, choices: Sequence[Accumulator]) -> bytes:
        (answer,) = choices
        return orjson.dumps(response_object(reader, answer, status=status_of(answer)))


RESPONSES = Responses()
