"""ApiLimits: every cap that the HTTP API sets on one call, with its default. It reads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from service.queues.contract import QueueLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """Caps on one call. Times are in seconds. What is over a cap is refused, never cut short."""

    # --- the body -------------------------------------------------------------------------
    max_body_bytes: int = 4 * 2**20
    max_json_depth: int = 64
    body_timeout: float = 20.0  # from the first read of a body to its last byte
    inline_body_bytes: int = 65_536  # longer bodies are parsed in a thread

    # --- work that waits for a thread, in each pool ------------------------------------------
    text_threads: int = 2
    max_waiting_bytes: int = 128 * 2**20
    max_tenant_waiting_bytes: int = 32 * 2**20
    max_waiting_maps: int = 32  # attention
    max_tenant_waiting_maps: int = 4

    # --- what a body may ask for ----------------------------------------------------------
    max_choices: int = 16  # n, best_of
    max_prompts: int = 64
    max_work_units: int = 64  # prompts times choices
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 256
    max_bad_words: int = 64
    max_bad_word_chars: int = 64
    max_allowed_token_ids: int = 1024
    max_logprobs: int = 5  # completions
    max_top_logprobs: int = 20  # chat
    max_prediction_tokens: int = 16_384  # the rest of a prediction is cut off: it is only a hint
    max_echo_tokens: int = 8192  # echo or prompt log probabilities, over all prompts
    max_attention_tokens: int = 512  # a map has half the square of them, and is a second of work
    max_timeout_ms: int = 86_400_000
    max_key_chars: int = 255  # Idempotency-Key
    max_echoed_bytes: int = 2**20  # of a field that a response repeats
    max_chain: int = 256  # stored responses that an input refers to
    template_kwargs: frozenset[str] = frozenset({"enable_thinking", "thinking"})
    inline_text_chars: int = 8192  # longer prompts are tokenised in a thread

    # --- streams --------------------------------------------------------------------------
    keep_alive: float = 15.0  # silence after which a comment or a ping is sent
    stall_timeout: float = 60.0  # a reader that takes nothing for so long is dropped
    grace: float = 30.0  # an answer that its reader may come back for is kept so long
    replica_grace: float = 30.0  # any other, where the replica that serves its reader is gone
    backend_patience: float = 30.0  # an open stream waits so long for an absent queue
    backend_retry: float = 0.25
    keep_responses: float = 3600.0  # stored responses and their input are kept so long
    resume_window: float = 600.0  # as the queue's: after it an id is "expired", not "unknown"
    max_event_id_chars: int = 4096
    sweep_interval: float = 1.0  # between two searches for requests past their deadline

    @property
    def attend_interval(self) -> float:
        """Seconds between two times of telling the queue who is read here."""
        return min(grace for grace in (self.grace, self.replica_grace) if grace > 0) / 3

    @property
    def sweep_pause(self) -> float:
        """Seconds without a sweep after which graces begin anew.

        Readers are attended as often, so nobody's grace runs out within a shorter absence of the
        queue.
        """
        return min(QueueLimits().sweep_pause, max(0.2, self.attend_interval))
