#!lua
-- Admits all requests of a submission or none. Not allowed when memory is full.
-- ARGV: submission, tenant, manifest, nonce, idempotency name ('' for none), fingerprint,
--   idempotency ttl, max requests, max tokens, max per tenant, live ttl, grace (times in ms; '' for no grace),
--   then for each request: id, cost, timeout ms (0 for none), priority, body.
-- Replies {status, submission to follow, queued requests, queued tokens}.
local sid, tenant, nonce, name, fingerprint = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6]
local FIRST, FIELDS = 13, 5
local queued = num(redis.call('HGET', ADMISSION, 'q'))
local tokens = num(redis.call('HGET', ADMISSION, 'tok'))
local function reply(status, id) return { status, id or sid, queued, tokens } end

-- The same call once more, after a lost reply.
local known = redis.call('HGET', submission_key(sid), 'by')
if known then return reply(known == nonce and 'ok' or 'exists') end
local idem = PREFIX .. 'idem:' .. name
if name ~= '' then
  local earlier = redis.call('HMGET', idem, 'sub', 'fpr')
  if earlier[1] then
    return reply(earlier[2] == fingerprint and 'exists' or 'conflict', earlier[1])
  end
end

local num_requests, cost = (#ARGV - FIRST + 1) / FIELDS, 0
for i = FIRST, #ARGV, FIELDS do cost = cost + ARGV[i + 1] end
if num(redis.call('HGET', ADMISSION, 't:' .. tenant)) + num_requests > num(ARGV[10]) then
  return reply('tenant')
end
if queued + num_requests > num(ARGV[8]) or tokens + cost > num(ARGV[9]) then return reply('full') end

local now = now_ms()
for i = FIRST, #ARGV, FIELDS do
  local rid, timeout, priority = ARGV[i], num(ARGV[i + 2]), ARGV[i + 3]
  local deadline = timeout > 0 and now + timeout or 0
  local eid = redis.call('XADD', queue_key(priority), '*', 'rid', rid)
  redis.call('HSET', request_key(rid), 'st', 'queued', 'ep', 0, 'own', '', 'n', 0, 'att', 0,
    'ten', tenant, 'cost', ARGV[i + 1], 'dl', deadline, 'ct', now, 'eid', eid, 'pr', priority,
    'sub', sid, 'body', ARGV[i + 4])
  redis.call('ZADD', DEADLINES, deadline > 0 and deadline or now + num(ARGV[11]), rid)
end
redis.call('HSET', submission_key(sid), 'ten', tenant, 'man', ARGV[3], 'num', num_requests,
  'left', num_requests, 'by', nonce, 'gr', ARGV[12])
if ARGV[12] ~= '' then redis.call('ZADD', DESERTED, now + num(ARGV[12]), sid) end
redis.call('HINCRBY', ADMISSION, 't:' .. tenant, num_requests)
queued = redis.call('HINCRBY', ADMISSION, 'q', num_requests)
tokens = redis.call('HINCRBY', ADMISSION, 'tok', cost)
if name ~= '' then
  redis.call('HSET', idem, 'sub', sid, 'fpr', fingerprint)
  redis.call('PEXPIRE', idem, ARGV[7])
end
redis.call('PUBLISH', WORK, 'new')
return reply('ok')
