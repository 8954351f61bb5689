"""Models, tokens, probes, the admin port, and /openapi.json."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from service.app import build_admin_app


async def test_models(service: Any) -> None:
    listed = (await service.client.get("/v1/models")).json()
    (card,) = listed["data"]
    assert listed["object"] == "list"
    assert card["id"] == "tiny-model"
    assert card["max_model_len"] == 256
    assert card["system_fingerprint"] == card["numeric_class"] == "class-1"
    assert (await service.client.get("/v1/models/tiny-model")).json() == card
    for name in ("nope", "a/b", "..%2fx"):
        reply = await service.client.get(f"/v1/models/{name}")
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"
    assert (await service.client.get("/version")).json() == {"version": "0.0.1"}


async def test_tokens_there_and_back(service: Any) -> None:
    for text in ("hello world", "één €5 😀 <|im_e", "x" * 1000):
        reply = (
            await service.post("/tokenize", {"prompt": text, "return_token_strs": True})
        ).json()
        assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
        assert reply["max_model_len"] == 256
        back = await service.post("/detokenize", {"tokens": reply["tokens"]})
        assert back.json() == {"prompt": text}
    messages = [{"role": "user", "content": "hi"}]
    reply = (await service.post("/tokenize", {"messages": messages})).json()
    assert reply["tokens"] == service.tokenizer.apply_chat_template(messages)
    assert reply["token_strs"] is None
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": messages}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ):
        refused = await service.post(path, body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_probes_report_the_state_of_the_process(service: Any) -> None:
    paths = ("/health/startup", "/health/live", "/health/ready", "/health")

    async def statuses() -> list[int]:
        return [(await service.client.get(path)).status_code for path in paths]

    assert await statuses() == [200, 200, 200, 200]
    for name, value, expected in (
        ("started", False, [503, 200, 503, 200]),
        ("live", False, [200, 503, 200, 503]),
        ("draining", True, [200, 200, 503, 200]),
    ):
        before, service.state[name] = service.state[name], value
        assert await statuses() == expected
        service.state[name] = before


async def test_the_admin_port_has_only_metrics_and_probes(service: Any) -> None:
    admin = build_admin_app(
        service.app.state.health, version="0.0.1", render_metrics=lambda: b"quire_up 1\n"
    )
    transport = httpx.ASGITransport(app=admin)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        reply = await client.get("/metrics")
        assert reply.text == "quire_up 1\n"
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 404
        assert (await client.post("/metrics")).status_code == 405


async def test_the_observer_sees_how_calls_ended(service: Any) -> None:
    body = {"model": "tiny-model", "prompt": "hello", "max_tokens": 8, "n": 2}
    await service.post("/v1/completions", body)
    await service.post("/v1/completions", body | {"stream": True})
    for report, streamed in zip(service.observer.reports, (False, True), strict=True):
        assert (report.outcome, report.streamed, report.completion_tokens) == (
            "length",
            streamed,
            16,
        )
        assert report.tenant == "public"
        assert report.endpoint == "completions"
        assert 0 <= report.to_first_token <= report.duration
    assert service.observer.statuses == [200, 200]


@pytest.mark.slow
async def test_everything_is_described(start_service: Any) -> None:
    async with start_service(docs=True) as service:
        document = (await service.client.get("/openapi.json")).json()
        assert (await service.client.get("/docs")).status_code == 200
    assert len(document["paths"]) >= 12
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), (path, method)
            assert operation.get("summary"), (path, method)
            assert "422" not in operation["responses"], "FastAPI's own error shape never appears"
            for parameter in operation.get("parameters", []):
                assert parameter.get("description"), (path, parameter["name"])
    for name, schema in document["components"]["schemas"].items():
        assert schema.get("description"), name
        for field, content in schema["properties"].items():
            described = content.get("description") or "$ref" in content  # to a described schema
            assert described, (name, field)
