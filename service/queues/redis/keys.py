"""The names of the Redis queue's keys and channels. The scripts derive the same names in Lua.

    quire:2:{s0}:adm          hash     counters: q, tok, run; tens: tenants in flight;
                                       t:<tenant>, k:<key>: in flight; r:<tenant>: running;
                                       f:<tenant>: end of its last turn; now: the latest turn
    quire:2:{s0}:w0 .. w2     zset     one per priority: queued request by its turn, tokens
    quire:2:{s0}:w0:<f> ..    zset     the same for requests that need the features <f> of an engine
    quire:2:{s0}:lines        set      the <f> for which there may be such a line
    quire:2:{s0}:models       hash     q, tok and run of each model: "<field> <model>" -> number
    quire:2:{s0}:stored       hash     bytes of submissions: all, t:<tenant>
    quire:2:{s0}:lent         hash     limit -> what other shards may use of this one's share
    quire:2:{s0}:loan:<nonce>  string  amounts that a transfer moved, for a minute
    quire:2:{s0}:kept:<tenant>  zset   entry of `gone` by the end of its resume window, ms: what is
                                       kept longer than that and may be evicted
    quire:2:{s0}:keepers      zset     tenant by the bytes of what it has in kept:<tenant>
    quire:2:{s0}:gone         zset     "<bytes> <tenant> <submission or idempotency hash>" by the
                                       time at which it is gone, ms
    quire:2:{s0}:since        zset     queued request by the time of its submission, ms
    quire:2:{s0}:q0 .. q2     stream   one per priority: running requests; group `engines`,
                                       field rid
    quire:2:{s0}:r:<request>  hash     the state of a request
    quire:2:{s0}:t:<request>  stream   its journal
    quire:2:{s0}:s:<sub>      hash     the submission: tenant, manifest, number of requests, grace;
                                       if it is kept: input, ms, bytes without them
    quire:2:{s0}:idem:<hash>  hash     idempotency key -> submission, fingerprint
    quire:2:{s0}:k:<key>:<unit>  string  its meter: when it is back to zero, ms; see `Meter`
    quire:2:{s0}:dl           zset     request by the time to look at its deadline, ms
    quire:2:{s0}:left         zset     submission by the time at which it counts as abandoned, ms
    quire:2:{s0}:swept        string   start of the present run of sweeps without a pause, ms
    quire:2:{s0}:engines      hash     engine -> "<last seen, ms> <JSON>"
    quire:2:{s0}:groups       string   those reports summed up, as JSON, for a second
    quire:2:{s0}:h:<prefix>   hash     the engines that hold a prefix
    quire:2:{s0}:reserved     hash     queued request -> "<until, ms> <prefix>": left to its holders
    quire:2:{s0}:suspects     zset     suspect that waits for its isolation, by the time, ms
    quire:2:{s0}:lane         hash     isolated request -> the engine that runs it
    quire:2:{s0}:isolates:<e>  string  when engine <e> last began to isolate requests, ms
    quire:2:{s0}:blamed:<e>   set      requests that the death of engine <e> counts against
    quire:2:{s0}:usage:<day>  hash     "<kind> <tenant> <key> <model>" -> number, see usage.py
    quire:2:{s0}:lease:<name>  string  the owner of a named lease
    quire:2:{s0}:probe        none     never set; deleting it tests whether the server takes writes
    quire:2:{s0}:m:<name>     channel  messages to an engine or to a reader's mailbox: see mail.lua
    quire:2:{s0}:kinds        set      the kinds <k> of engines that may wait: see mail.lua
    quire:2:{s0}:waiting:<k>  zset     engine of a kind by the time, ms, up to which it waits for
                                       something to claim
    quire:2:{s0}:looked:<k>   string   engines of this kind have just looked for orphans

The 2 is the version of this layout (`LAYOUT`): processes with another one do not see these keys.
The braces are the hash tag of Redis Cluster: all keys of a shard are in one slot. In a cluster the
tag has a suffix (`{s0.4}`), which `servers` chooses.
"""

from __future__ import annotations

import hashlib
import re

LAYOUT = 2
PREFIX = "quire"  # unless the URL has `prefix=`

_SLOT = re.compile(r"-[0-9a-f]*([0-9a-f]{4})(\.\d+)?")


class ShardKeys:
    """The names in one shard. Deployments with different prefixes can share a server."""

    def __init__(self, shard: int, *, prefix: str = PREFIX, tag: str | None = None) -> None:
        self.shard = shard
        self.prefix = f"{prefix}:{LAYOUT}:{{{tag or f's{shard}'}}}:"
        self.admission = self.prefix + "adm"
        self.models = self.prefix + "models"
        self.stored = self.prefix + "stored"
        self.gone = self.prefix + "gone"
        self.lent = self.prefix + "lent"
        self.engines = self.prefix + "engines"
        self.probe = self.prefix + "probe"

    def tokens_of(self, key: str) -> str:
        """The meter of an API key's tokens per minute."""
        return f"{self.prefix}k:{key}:tokens"

    def request(self, request_id: str) -> str:
        return f"{self.prefix}r:{request_id}"

    def journal(self, request_id: str) -> str:
        return f"{self.prefix}t:{request_id}"

    def mailbox(self, name: str) -> str:
        return f"{self.prefix}m:{name}"

    def usage(self, day: int) -> str:
        return f"{self.prefix}usage:{day}"

    def submission(self, submission_id: str) -> str:
        return f"{self.prefix}s:{submission_id}"


def shard_of(identifier: str, *, shards: int) -> int:
    """The shard of a submission or request, by the slot in its id; 0 if it has none."""
    match = _SLOT.search(identifier)
    return int(match[1], 16) % shards if match else 0


def idempotency_name(tenant: str, key: str) -> str:
    """Of fixed length, and different for ("a:b", "c") and ("a", "b:c")."""
    return hashlib.sha256(f"{len(tenant)}:{tenant}:{key}".encode()).hexdigest()[:40]


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
