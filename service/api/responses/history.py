"""Stored responses: one by its id, the items before a new one, and the items that it refers to.

A response keeps its own input items; those before them are its parent's, whose id it names
(`previous_response_id`). Its output is a function of its journal. Each use of a chain starts the
time for which all of its responses are kept again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from pydantic import TypeAdapter

from service.api.auth import Tenant
from service.api.call import call_age
from service.api.context import ApiContext
from service.api.generation.manifest import Endpoint, Manifest
from service.api.generation.reader import AnswerReader
from service.api.responses.items import AnyItem, InputItem, InputReference, stored_item
from service.api.responses.object import PREFIX, Status, output_items, status_of
from service.api.responses.schema import ResponseBody
from service.errors import BadRequest, Conflict, NotFound

_ITEM_ID = re.compile(r"[a-z]{2,4}_(s[0-9]{1,4}-[0-9a-f]{32})(_(in)?[0-9]{1,4})?")
_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[AnyItem])


@dataclass(frozen=True, slots=True)
class Conversation:
    """The items of a new response: `items` are all of them, `own` those that are stored with it."""

    items: Sequence[InputItem]
    own: Sequence[InputItem]

    def stored_input(self, call_id: str) -> str:
        """Its own items as JSON, each with an id."""
        items = [stored_item(item, f"{call_id}_in{i}") for i, item in enumerate(self.own)]
        return orjson.dumps(items).decode()


async def find_response(
    response_id: str, context: ApiContext, tenant: Tenant
) -> tuple[str, Manifest]:
    """The call and the manifest of a stored response. Raises NotFound, with the same text for ids
    that are unknown, malformed, another tenant's, or of an answer that is no stored response.
    """
    call_id = response_id.removeprefix(PREFIX)
    valid = call_id != response_id and call_age(call_id) is not None
    stored = await context.queue.lookup(call_id) if valid else None
    if stored is not None and stored.tenant == tenant.name:
        manifest = Manifest.from_json(stored.manifest)
        if manifest.endpoint is Endpoint.RESPONSES and manifest.stored:
            return call_id, manifest
    raise NotFound("there is no such response", code="response_not_found")


async def input_items(call_id: str, context: ApiContext) -> list[dict[str, Any]]:
    """The input items of a stored response. Raises NotFound if they are no longer kept."""
    text = await context.queue.read_input(call_id)
    if text is None:
        raise NotFound("the input of this response is not kept", code="response_not_found")
    items: list[dict[str, Any]] = orjson.loads(text)
    return items


async def conversation(body: ResponseBody, context: ApiContext, tenant: Tenant) -> Conversation:
    """The items of the responses before, and of the body. Raises NotFound, Conflict, BadRequest or
    Unavailable.
    """
    history = _History(context, tenant)
    before: list[InputItem] = []
    if body.previous_response_id is not None:
        before = await history.chain(body.previous_response_id)
    own = [
        await history.item(item, index) if isinstance(item, InputReference) else item
        for index, item in enumerate(body.input)
    ]
    if history.used:
        await context.queue.touch(history.used)
    return Conversation([*before, *own], own)


class _History:
    """Reads stored responses for one call: no more of them, and no more bytes, than its limits."""

    def __init__(self, context: ApiContext, tenant: Tenant) -> None:
        self._context = context
        self._tenant = tenant
        self._size = 0
        self._items: dict[str, list[dict[str, Any]]] = {}  # call id -> input and output

    @property
    def used(self) -> list[str]:
        """The calls of all responses that were read."""
        return list(self._items)

    async def chain(self, response_id: str) -> list[InputItem]:
        """All items up to the end of a response, oldest first."""
        links: list[list[InputItem]] = []
        following: str | None = response_id
        while following is not None:
            missing = _missing("previous_response", param="previous_response_id")
            call_id, following = await self._read(following, missing)
            links.append(await self._parsed(self._items[call_id]))
        return [item for link in reversed(links) for item in link]

    async def item(self, reference: InputReference, index: int) -> InputItem:
        """The item that a reference names."""
        missing = _missing("item", param=f"input[{index}].id")
        match = _ITEM_ID.fullmatch(reference.id)
        if match is None:
            raise missing
        if match[1] not in self._items:
            await self._read(PREFIX + match[1], missing)
        for item in self._items[match[1]]:
            if item["id"] == reference.id:
                (found,) = await self._parsed([item])
                return found
        raise missing

    async def _read(self, response_id: str, missing: NotFound) -> tuple[str, str | None]:
        """Reads a response; returns its call and its parent."""
        context, param = self._context, missing.param
        if len(self._items) >= context.limits.max_chain:
            raise _too_long(f"{context.limits.max_chain} responses", param=param)
        try:
            call_id, manifest = await find_response(response_id, context, self._tenant)
            items = await input_items(call_id, context)
            reader = AnswerReader(
                call_id, manifest, context, tenant=self._tenant.name, arrived=0.0, resumed=True
            )
            (answer,) = await reader.collect_now()
        except NotFound:
            raise missing from None
        status = status_of(answer)
        if status in {Status.QUEUED, Status.IN_PROGRESS}:
            message = "a response that the input refers to has not ended"
            raise Conflict(message, code="response_in_progress", param=param)
        items += output_items(reader, answer, status)
        self._items[call_id] = items
        self._size += len(orjson.dumps(items))
        if self._size > context.limits.max_body_bytes:
            raise _too_long(f"responses of {context.limits.max_body_bytes} bytes", param=param)
        return call_id, manifest.given_back.get("previous_response_id")

    async def _parsed(self, items: Sequence[dict[str, Any]]) -> list[InputItem]:
        size = len(orjson.dumps(items))
        if size <= self._context.limits.inline_body_bytes:
            return _ITEMS.validate_python(items)
        parse = partial(_ITEMS.validate_python, items)
        return await self._context.pools.bodies.run(self._tenant.name, parse, weight=size)


def _missing(what: str, *, param: str) -> NotFound:
    message = f"this {what.replace('_', ' ')} is not kept, or never existed"
    return NotFound(message, code=f"{what}_not_found", param=param)


def _too_long(most: str, *, param: str | None) -> BadRequest:
    message = f"an input may refer to at most {most}; send the items that are needed instead"
    return BadRequest(message, code="chain_too_long", param=param)
