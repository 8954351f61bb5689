"""Every error that a client can receive, with its HTTP status and OpenAI `type` and `code`.

A message states the limit that was exceeded and never repeats the input. The engine and the queues
raise these too, but only `service/api` turns them into JSON. `StartupError` is for the operator,
never for a client.
"""

from __future__ import annotations

from typing import ClassVar


class QuireError(Exception):
    """Base of all errors with an HTTP answer.

    `param` is the dotted path of the invalid field; `retry_after` is in seconds; `retryable`
    False becomes the header `x-should-retry: false`.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        retryable: bool = True,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after
        self.retryable = retryable

    def details(self) -> dict[str, str]:
        """More fields of the error's JSON object."""
        return {}


class BadRequest(QuireError):
    """The request is invalid."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class Unauthorized(BadRequest):
    """No valid key."""

    status = 401
    default_code = "invalid_api_key"


class Forbidden(BadRequest):
    """The key is valid, but not permitted to do this."""

    status = 403
    default_code = "permission_denied"


class NotFound(BadRequest):
    """No such route, model or stream."""

    status = 404
    default_code = "not_found"


class MethodNotAllowed(BadRequest):
    """The route exists, the method does not."""

    status = 405
    default_code = "method_not_allowed"


class RequestTimeout(BadRequest):
    """The body did not arrive in time."""

    status = 408
    default_code = "request_timeout"


class Conflict(BadRequest):
    """An idempotency key was used again with another body."""

    status = 409
    default_code = "idempotency_key_conflict"


class Gone(BadRequest):
    """A stream's resume window is over."""

    status = 410
    default_code = "stream_expired"


class TooLarge(BadRequest):
    """The body is over the limit."""

    status = 413
    default_code = "request_too_large"


class UrlTooLong(BadRequest):
    """The URL is over the limit."""

    status = 414
    default_code = "url_too_long"


class UnsupportedMedia(BadRequest):
    """The body is not plain JSON."""

    status = 415
    default_code = "unsupported_media_type"


class HeadersTooLarge(BadRequest):
    """The headers are over the limit on their number or size."""

    status = 431
    default_code = "headers_too_large"


class RateLimited(QuireError):
    """The caller is over its own limit."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Unavailable(QuireError):
    """The service cannot accept the request now: queue full, Redis down, no engine, draining."""

    status = 503
    type = "service_unavailable_error"
    default_code = "server_is_overloaded"


class ShuttingDown(Unavailable):
    """The replica shuts down before the answer is complete.

    Another replica can resume it by `request_id`, after `last_event_id` if events were sent;
    without an id the answer ends with the process.
    """

    default_code = "shutting_down"

    def __init__(self, *, request_id: str | None = None, last_event_id: str | None = None) -> None:
        self.request_id = request_id
        self.last_event_id = last_event_id
        if request_id is None:
            super().__init__("the server is shutting down; send the request again")
            return
        path = f"/v1/streams/{request_id}"
        if last_event_id is not None:
            path += f"?after={last_event_id}"
        super().__init__(f"this replica is shutting down; another one has the rest: GET {path}")

    def details(self) -> dict[str, str]:
        """The ids to resume the answer by."""
        names = {"request_id": self.request_id, "last_event_id": self.last_event_id}
        return {name: value for name, value in names.items() if value is not None}


class DeadlineExceeded(QuireError):
    """The deadline passed before the answer was complete."""

    status = 504
    default_code = "deadline_exceeded"


class GenerationFailed(QuireError):
    """The engine ended the request with an error; `code` is from the journal."""

    default_code = "generation_failed"


class StreamDivergence(QuireError):
    """The journal no longer matches what the client was sent."""

    status = 409
    default_code = "stream_divergence"


class StartupError(Exception):
    """A configuration that cannot be served; its message is one line for the operator."""
