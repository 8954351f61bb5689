"""Checker: compares clients' transcripts, the journal and the metrics with the promises.

P1  what a client received, over all its connections, is the token sequence of the journal
P2  that sequence is the one of an undisturbed run
P3  there is one end, and nothing after it
P5  at the end nothing is queued, pending, running or held in the KV pool
conservation: accepted = finished + failed + cancelled + expired + in flight, and lost = 0
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from service.bench.sse import DONE
from service.messages import End, Tokens
from tests.cluster.client import Transcript
from tests.cluster.cluster import Cluster
from tests.cluster.processes import total

SETTLE = 60.0  # seconds within which a cluster must become idle


async def check_all(
    cluster: Cluster,
    transcripts: Sequence[Transcript],
    *,
    expected: Callable[[dict[str, Any]], Sequence[int]] | None = None,
    same_bytes: bool = True,
    counted: bool = True,
) -> Counter[str]:
    """Runs every check. Returns the number of requests by finish reason.

    `expected` returns the tokens of an undisturbed run; default: the oracle's. `same_bytes` False:
    the journal was truncated and written again in other chunks, so that only tokens and text can
    be compared. `counted` False: an API replica was killed, and its counters are lost.
    """
    for transcript in transcripts:
        await check_transcript(
            cluster, transcript, expected=expected or cluster.expected, same_bytes=same_bytes
        )
    await check_rest(cluster)
    return check_conservation(cluster, transcripts, counted=counted)


async def check_transcript(
    cluster: Cluster,
    transcript: Transcript,
    *,
    expected: Callable[[dict[str, Any]], Sequence[int]],
    same_bytes: bool,
) -> None:
    """P1, P2 and P3 for one request."""
    assert transcript.call_id is not None
    tokens = transcript.tokens
    undisturbed = list(expected(transcript.body))
    assert tokens == undisturbed[: len(tokens)], "P2: wrong token"
    journal, end = await read_journal(cluster, transcript.call_id)
    assert tokens == journal[: len(tokens)], "P1: the client has tokens that the journal lacks"
    if transcript.ended:
        check_ending(transcript, end)
    if transcript.finish_reason is not None:
        assert tokens == journal, "P1: the end arrived before the last token"
    if transcript.finish_reason == "length":
        assert tokens == undisturbed, "P1: missing tokens"
    replayed = await cluster.client.replay(transcript.call_id)
    if same_bytes:
        whole = b"".join(event.raw for event in replayed)
        assert whole.startswith(transcript.raw), "P1: the bytes are no prefix of those of a replay"
        assert not transcript.ended or whole == transcript.raw
    text = "".join(event.text for event in replayed)
    assert text.startswith(transcript.text), "P1: wrong text"


def check_ending(transcript: Transcript, end: End) -> None:
    """P3 on the wire: one finish reason and [DONE], or one error; nothing after it."""
    reasons = [event.finish_reason for event in transcript.events if event.finish_reason]
    errors = [event.error for event in transcript.events if event.error]
    done = [event.data for event in transcript.events].count(DONE)
    if errors:
        assert (reasons, len(errors), done) == ([], 1, 0), "P3"
        assert errors == [end.error or errors[0]]
        return
    assert (len(reasons), done) == (1, 1), "P3"
    assert reasons == [end.reason.value]


async def read_journal(cluster: Cluster, call_id: str) -> tuple[list[int], End]:
    """The tokens and the end of a request. Checks P3."""
    entries = cluster.ask("XRANGE", cluster.key(f"t:{call_id}.0"), "-", "+")
    ends = [entry_id for entry_id, _ in entries if entry_id.endswith("-1")]
    assert len(ends) == 1, f"P3: {len(ends)} ends"
    assert entries[-1][0] == ends[0], "P3: entries after the end"
    async with cluster.queue() as queue:
        *records, end = await queue.read(f"{call_id}.0")
    tokens: list[int] = []
    for record in records:
        assert isinstance(record, Tokens)
        assert record.start == len(tokens), "the journal has a gap or an overlap"
        tokens += record.ids
    assert isinstance(end, End)
    assert end.count == len(tokens)
    return tokens, end


async def check_rest(cluster: Cluster) -> None:
    """P5: soon nothing is left of any request."""
    ends = time.monotonic() + SETTLE
    while left := await asyncio.to_thread(leftovers, cluster):
        assert time.monotonic() < ends, f"P5: left over: {left}"
        await asyncio.sleep(0.1)


def leftovers(cluster: Cluster) -> dict[str, Any]:
    """State that an idle cluster does not have."""
    left: dict[str, Any] = {
        "counters": cluster.ask("HGETALL", cluster.key("adm")),
        "deadlines": cluster.ask("ZRANGE", cluster.key("dl"), 0, -1),
        "suspects": cluster.ask("ZRANGE", cluster.key("suspects"), 0, -1),
        "isolated": cluster.ask("HGETALL", cluster.key("lane")),
        "lines": cluster.ask("SMEMBERS", cluster.key("lines")),
    }
    for priority in range(3):
        stream = cluster.key(f"q{priority}")
        if cluster.ask("EXISTS", stream):
            for group in cluster.ask("XINFO", "GROUPS", stream):
                left[f"pending {priority}"] = dict(
                    zip(group[::2], group[1::2], strict=True) if isinstance(group, list) else group
                )["pending"]
    for engine in cluster.engines:
        if engine.is_up:
            samples = engine.metrics()
            for name, label in (
                ("quire_kv_blocks", 'state="used"'),
                ("quire_sequences_running", ""),
                ("quire_sequences_waiting", ""),
            ):
                left[f"{engine.log.name} {name}"] = total(samples, name, label)
    return {name: value for name, value in left.items() if value}


def check_conservation(
    cluster: Cluster, transcripts: Sequence[Transcript], *, counted: bool
) -> Counter[str]:
    """Every accepted request has one end in the journal, and none is lost."""
    reasons: Counter[str] = Counter()
    for key in cluster.ask("KEYS", cluster.key("r:*")):
        state, ending = cluster.ask("HMGET", key, "st", "fin")
        assert state == "ended", f"in flight: {key}"
        reasons[ending.split('"')[3]] += 1
    lost = sum(api.metric("quire_requests_lost_total") for api in cluster.apis if api.is_up)
    assert lost == 0
    accepted = cluster.accepted()
    if counted:
        assert accepted == sum(reasons.values()), f"{accepted} accepted, ended: {reasons}"
    else:
        assert accepted <= sum(reasons.values())
    known = {transcript.call_id for transcript in transcripts if transcript.call_id}
    assert len(known) <= sum(reasons.values())
    return reasons
