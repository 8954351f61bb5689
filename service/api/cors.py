"""CORS: lets web pages of other origins call the API, by Starlette's middleware.

No cookies are involved: a page sends its key in a header, as any client does. The headers that a
page needs to resume a stream and to wait for its rate limit are exposed to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

EXPOSED = (
    "x-request-id", "request-id", "retry-after", "retry-after-ms", "x-should-retry",
    *(
        f"x-ratelimit-{word}-{unit}"
        for word in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
)  # fmt: skip


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Adds the middleware. Called last: a preflight request has no key."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
    )
