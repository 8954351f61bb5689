"""The names of the Redis queue's keys and channels. The scripts make the same names in Lua.

    quire:2:{s0}:adm          hash     counters: q, tok, run; tens: tenants in flight;
                                       t:<tenant>, k:<key>: in flight; r:<tenant>: running;
                                       f:<tenant>: end of its last turn; now: the latest turn
    quire:2:{s0}:w0 .. w2     zset     one per priority: waiting request by its turn, tokens
    quire:2:{s0}:w0:<f> ..    zset     the same for requests that need the features <f> of an engine
    quire:2:{s0}:lines        set      the <f> for which there may be such a line
    quire:2:{s0}:stored       hash     bytes of submissions: all, t:<tenant>
    quire:2:{s0}:gone         zset     "<bytes> <tenant> <submission or idempotency hash>" by the
                                       time at which it is gone, ms
    quire:2:{s0}:since        zset     waiting request by the time of its submission, ms
    quire:2:{s0}:q0 .. q2     stream   one a priority: what runs; group `engines`, field rid
    quire:2:{s0}:r:<request>  hash     the state of a request
    quire:2:{s0}:t:<request>  stream   its journal; also the channel that tells of news in it
    quire:2:{s0}:s:<sub>      hash     the submission: tenant, manifest, number of requests, grace
    quire:2:{s0}:idem:<hash>  hash     idempotency key -> submission, fingerprint
    quire:2:{s0}:k:<key>:<unit>  string  when its requests or tokens of a minute are all back, ms
    quire:2:{s0}:dl           zset     request by the time to look at its deadline, ms
    quire:2:{s0}:left         zset     submission by the time at which it counts as deserted, ms
    quire:2:{s0}:swept        string   since when there were sweeps without a pause, ms
    quire:2:{s0}:engines      hash     engine -> "<last seen, ms> <JSON>"
    quire:2:{s0}:suspects     zset     request that waits for its isolation, by the time, ms
    quire:2:{s0}:lane         hash     isolated request -> the engine that runs it
    quire:2:{s0}:isolates:<e>  string  when engine <e> last began to isolate requests, ms
    quire:2:{s0}:blamed:<e>   set      requests that the death of engine <e> counts against
    quire:2:{s0}:probe        none     never set; deleting it tests whether the server takes writes
    quire:2:{s0}:work, stops  channel  something to claim; a running request was stopped

The 2 is the version of this layout: processes of another one do not see these keys. The braces are
the cluster's hash tag: all keys of a shard lie in one slot.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

LAYOUT = 2

_SHARD = re.compile(r"s(\d{1,4})-")


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """The names in one shard."""

    shard: int

    @property
    def prefix(self) -> str:
        return f"quire:{LAYOUT}:{{s{self.shard}}}:"

    @property
    def admission(self) -> str:
        return self.prefix + "adm"

    @property
    def stored(self) -> str:
        return self.prefix + "stored"

    @property
    def gone(self) -> str:
        return self.prefix + "gone"

    @property
    def engines(self) -> str:
        return self.prefix + "engines"

    @property
    def work(self) -> str:
        return self.prefix + "work"

    @property
    def probe(self) -> str:
        return self.prefix + "probe"

    @property
    def stops(self) -> str:
        return self.prefix + "stops"

    def request(self, request_id: str) -> str:
        return f"{self.prefix}r:{request_id}"

    def journal(self, request_id: str) -> str:
        return f"{self.prefix}t:{request_id}"

    def submission(self, submission_id: str) -> str:
        return f"{self.prefix}s:{submission_id}"


def shard_of(identifier: str, *, shards: int) -> int:
    """The shard that an id of a submission or request names (`s<shard>-...`); 0 where none."""
    match = _SHARD.match(identifier)
    return int(match[1]) % shards if match else 0


def idempotency_name(tenant: str, key: str) -> str:
    """Of fixed length, and different for ("a:b", "c") and ("a", "b:c")."""
    return hashlib.sha256(f"{len(tenant)}:{tenant}:{key}".encode()).hexdigest()[:40]


def milliseconds(seconds: float) -> int:
    """Times as the scripts have them."""
    return round(seconds * 1000)
