#!lua
-- Admits all requests of a submission or none. Not allowed when memory is full.
-- ARGV: submission, tenant, manifest, nonce, idempotency name ('' for none), fingerprint,
--   idempotency ttl, max requests, max tokens, max per tenant, live ttl, grace (times in ms; '' for no grace),
--   key ('' for none), its tokens a minute, max in flight (0 for no limit),
--   max bytes, max bytes of a tenant, bytes of the submission besides its bodies, of its idempotency record,
--   then for each request: id, cost, timeout ms (0 for none), priority, body, the answer's share of the cost,
--   bytes of the body, the features that it needs of an engine ('' for none).
-- Replies {status, submission to follow, queued requests, queued tokens, and of the key's tokens:
--   ms to wait, ms used, these as text}.
local sid, tenant, nonce, name, fingerprint = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6]
local key, tokens_per_minute, in_flight = ARGV[13], num(ARGV[14]), num(ARGV[15])
local tokens_meter = meter_key(key, 'tokens')
local max_bytes, max_tenant_bytes, kept, record = num(ARGV[16]), num(ARGV[17]), num(ARGV[18]), num(ARGV[19])
local FIRST, FIELDS = 20, 8
local queued = num(redis.call('HGET', ADMISSION, 'q'))
local tokens = num(redis.call('HGET', ADMISSION, 'tok'))
local function reply(status, id, wait)
  return { status, id or sid, queued, tokens, fraction(wait or 0), fraction(used_ms(tokens_meter)) }
end

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

local num_requests, cost, bytes = (#ARGV - FIRST + 1) / FIELDS, 0, kept
for i = FIRST, #ARGV, FIELDS do cost, bytes = cost + ARGV[i + 1], bytes + ARGV[i + 6] end
if num(redis.call('HGET', ADMISSION, 't:' .. tenant)) + num_requests > num(ARGV[10]) then
  return reply('tenant')
end
if in_flight > 0 and num(redis.call('HGET', ADMISSION, 'k:' .. key)) + num_requests > in_flight then
  return reply('tenant')
end
local wait = wait_ms(tokens_meter, tokens_per_minute, cost)
if wait > 0 then return reply('rate', nil, wait) end
local function stored(field) return num(redis.call('HGET', STORED, field)) + bytes + record end
if stored('t:' .. tenant) > max_tenant_bytes then return reply('tenant_storage') end
if queued + num_requests > num(ARGV[8]) or tokens + cost > num(ARGV[9]) then return reply('full') end
if stored('all') > max_bytes then return reply('storage') end

local now, time = now_ms(), redis.call('TIME')
local arrived = string.format('%d%06d', time[1], time[2])
for i = FIRST, #ARGV, FIELDS do
  local rid, timeout, priority = ARGV[i], num(ARGV[i + 2]), ARGV[i + 3]
  local deadline = timeout > 0 and now + timeout or 0
  -- Its turn, in tokens: where the tenant's last one ends, or now. See memory_ledger.py.
  local turn = math.max(num(redis.call('HGET', ADMISSION, 'now')), num(redis.call('HGET', ADMISSION, 'f:' .. tenant)))
  redis.call('HSET', ADMISSION, 'f:' .. tenant, string.format('%.0f', turn + ARGV[i + 1]))
  local eid = arrived .. ' ' .. rid -- of equal turns the older goes first
  local line = ARGV[i + 7]
  redis.call('ZADD', turns_key(priority, line), turn, eid)
  if line ~= '' then redis.call('SADD', LINES, line) end
  redis.call('ZADD', SINCE, now, rid)
  redis.call('HSET', request_key(rid), 'st', 'queued', 'ep', 0, 'own', '', 'n', 0, 'att', 0,
    'ten', tenant, 'cost', ARGV[i + 1], 'dl', deadline, 'ct', now, 'eid', eid, 'pr', priority,
    'sub', sid, 'body', ARGV[i + 4], 'sz', ARGV[i + 6], 'ft', line)
  if key ~= '' then
    redis.call('HSET', request_key(rid), 'key', key, 'tpm', tokens_per_minute, 'share', ARGV[i + 5])
  end
  redis.call('ZADD', DEADLINES, deadline > 0 and deadline or now + num(ARGV[11]), rid)
end
redis.call('HSET', submission_key(sid), 'ten', tenant, 'man', ARGV[3], 'num', num_requests,
  'left', num_requests, 'by', nonce, 'gr', ARGV[12], 'sz', kept)
count_bytes(tenant, bytes)
if ARGV[12] ~= '' then redis.call('ZADD', DESERTED, now + num(ARGV[12]), sid) end
if redis.call('HINCRBY', ADMISSION, 't:' .. tenant, num_requests) == num_requests then
  redis.call('HINCRBY', ADMISSION, 'tens', 1)
end
if key ~= '' then
  redis.call('HINCRBY', ADMISSION, 'k:' .. key, num_requests)
  use(tokens_meter, tokens_per_minute, cost)
end
queued = redis.call('HINCRBY', ADMISSION, 'q', num_requests)
tokens = redis.call('HINCRBY', ADMISSION, 'tok', cost)
if name ~= '' then
  redis.call('HSET', idem, 'sub', sid, 'fpr', fingerprint)
  redis.call('PEXPIRE', idem, ARGV[7])
  -- An earlier record of this key may be over, and still be counted.
  if count_until(now + ARGV[7], record, tenant, name) then count_bytes(tenant, record) end
end
redis.call('PUBLISH', WORK, 'new')
return reply('ok')
