"""ApiLimits: every limit of the HTTP API on one call, with its default."""

from __future__ import annotations

from dataclasses import dataclass

from service.queues import QueueLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """Limits on one call, times in seconds. A call over a limit is rejected, never truncated."""

    # --- the body -------------------------------------------------------------------------
    max_body_bytes: int = 4 * 2**20
    max_json_depth: int = 64
    body_timeout: float = 20.0  # from the first read of a body to its last byte
    inline_body_bytes: int = 65_536  # longer bodies are parsed in a thread

    # --- work waiting for a thread, per pool -------------------------------------------------
    text_threads: int = 2
    max_waiting_bytes: int = 128 * 2**20
    max_tenant_waiting_bytes: int = 32 * 2**20
    max_waiting_maps: int = 32  # attention
    max_tenant_waiting_maps: int = 4

    # --- the fields of a body -------------------------------------------------------------
    max_choices: int = 16  # n, best_of
    max_prompts: int = 64
    max_work_units: int = 64  # prompts times choices
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 256
    max_logprobs: int = 5  # completions
    max_top_logprobs: int = 20  # chat
    max_echo_tokens: int = 8192  # echo or prompt log probabilities, over all prompts
    max_attention_tokens: int = 512  # a map of n tokens has n * n / 2 weights and takes a second
    max_timeout_ms: int = 86_400_000
    max_key_chars: int = 255  # Idempotency-Key
    max_echoed_bytes: int = 2**20  # of a field that a response repeats
    template_kwargs: frozenset[str] = frozenset({"enable_thinking"})
    inline_text_chars: int = 8192  # longer prompts are tokenised in a thread

    # --- streams --------------------------------------------------------------------------
    keep_alive: float = 15.0  # interval without events after which a comment is sent
    stall_timeout: float = 60.0  # a client that reads nothing for so long is disconnected
    grace: float = 30.0  # reconnect grace period of a resumable answer
    replica_grace: float = 30.0  # of any other answer, if the replica of its reader is gone
    backend_patience: float = 30.0  # an open stream waits so long for an unavailable queue
    backend_retry: float = 0.25
    resume_window: float = 600.0  # as the queue's: after it an id is "expired", not "unknown"
    max_event_id_chars: int = 4096
    probe_timeout: float = 1.0  # of the readiness probe, for the queue
    sweep_interval: float = 1.0  # between two sweeps for requests past their deadline

    @property
    def attend_interval(self) -> float:
        """Seconds between two heartbeats of the readers."""
        return min(grace for grace in (self.grace, self.replica_grace) if grace > 0) / 3

    @property
    def sweep_pause(self) -> float:
        """Seconds without a sweep after which grace periods begin again.

        Heartbeats are as frequent, so no grace period ends within a shorter outage of the queue.
        """
        return min(QueueLimits().sweep_pause, max(0.2, self.attend_interval))
