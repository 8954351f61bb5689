"""Anthropic's messages as a dialect."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from service.api.anthropic.object import message_error_body, message_object
from service.api.anthropic.parse import NAMES, parse_message
from service.api.anthropic.stream import MessageRenderer
from service.api.generation.accumulate import Accumulator
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader


class Messages:
    """See `Dialect`."""

    name = Endpoint.MESSAGES
    path = "/v1/messages"
    names = NAMES
    id_headers: Sequence[bytes] = (b"request-id",)

    parse = staticmethod(parse_message)
    stream = staticmethod(MessageRenderer)
    error = staticmethod(message_error_body)

    def collect(self, reader: AnswerReader, choices: Sequence[Accumulator]) -> bytes:
        (answer,) = choices
        return orjson.dumps(message_object(reader, answer))


MESSAGES = Messages()
