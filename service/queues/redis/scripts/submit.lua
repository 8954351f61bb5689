#!lua
-- Admits all requests of a submission or none. Not allowed when memory is full.
-- args: id, tenant, nonce, fingerprint, idempotency (absent: no key), idempotency_ttl, live_ttl,
--   grace (absent: none), max_requests, max_tokens, max_per_tenant, max_bytes, max_tenant_bytes,
--   kept_bytes, base_bytes, token_bytes, keep (absent: the resume window),
--   idempotency_bytes, key (absent: none), tokens_per_minute, max_in_flight (absent: no
--   limit), account (for the usage), of a sharded queue also evict (boolean), prepaid (tokens that other shards have counted) and
--   debt (tokens that these have counted beyond their shares): see shares.py; and requests of {id, cost,
--   timeout, priority, share, prompt, encodes, bytes, features, prefixes}.
-- ARGV[2]: the manifest, ARGV[3]: the input, ARGV[3 + i]: the body of request i.
-- Returns {status, submission to follow, queued requests, queued tokens, and of the key's tokens: ms to
--   wait, ms used, as text}.
local sid, tenant, key, num_requests = args.id, args.tenant, args.key, #args.requests
local tokens_meter = meter_key(key or '', 'tokens')
local queued = num(redis.call('HGET', ADMISSION, 'q'))
local tokens = num(redis.call('HGET', ADMISSION, 'tok'))
local function reply(status, id, wait)
  return { status, id or sid, queued, tokens, fraction(wait or 0), fraction(used_ms(tokens_meter)) }
end

-- The same call, sent again after a lost reply.
local known = redis.call('HGET', submission_key(sid), 'by')
if known then return reply(known == args.nonce and 'ok' or 'exists') end
local idem = args.idempotency and PREFIX .. 'idem:' .. args.idempotency
if idem then
  local earlier = redis.call('HMGET', idem, 'sub', 'fpr')
  if earlier[1] then
    return reply(earlier[2] == args.fingerprint and 'exists' or 'conflict', earlier[1])
  end
end

local cost, bytes = 0, args.kept_bytes
for _, request in ipairs(args.requests) do
  cost, bytes = cost + request.cost, bytes + request.bytes
end
local function in_flight(counter) return num(redis.call('HGET', ADMISSION, counter)) + num_requests end
local function fits(field, most)
  local size = bytes + args.idempotency_bytes
  local function below() return num(redis.call('HGET', STORED, field)) + size <= most end
  if args.evict == false then return below() end
  return size <= most and make_room(below, field ~= 'all' and tenant or nil)
end
local function most(limit, name) return args.evict ~= nil and limit and limit - lent(name) or limit end
local most_in_flight = most(args.max_in_flight, 'k:' .. (key or ''))
if in_flight('t:' .. tenant) > most(args.max_per_tenant, 't:' .. tenant) then return reply('tenant') end
if most_in_flight and in_flight('k:' .. key) > most_in_flight then return reply('tenant') end
local metered = cost - (args.prepaid or 0)
local wait = 0
if metered > 0 then
  wait = wait_ms(tokens_meter, args.tokens_per_minute, metered + (args.debt or 0))
end
if wait > 0 then return reply('rate', nil, wait) end
if not fits('t:' .. tenant, most(args.max_tenant_bytes, 'b:' .. tenant)) then
  return reply('tenant_storage')
end
if queued + num_requests > most(args.max_requests, 'q') or tokens + cost > most(args.max_tokens, 'tok')
then
  return reply('full')
end
if not fits('all', most(args.max_bytes, 'b')) then return reply('storage') end

local now, time = now_ms(), redis.call('TIME')
local wakes = {} -- features -> the engines that hold prefixes of requests that need them
local arrived = string.format('%d%06d', time[1], time[2])
for i, request in ipairs(args.requests) do
  local rid, deadline = request.id, request.timeout and now + request.timeout or 0
  -- Its turn, in tokens: the end of its tenant's last one, or now. See memory/tenants.py.
  local turn = math.max(num(redis.call('HGET', ADMISSION, 'now')),
    num(redis.call('HGET', ADMISSION, 'f:' .. tenant)))
  redis.call('HSET', ADMISSION, 'f:' .. tenant, string.format('%.0f', turn + request.cost))
  local eid = arrived .. ' ' .. rid -- of equal turns the older goes first
  redis.call('ZADD', turns_key(request.priority, request.features), turn, eid)
  if request.features ~= '' then redis.call('SADD', LINES, request.features) end
  wakes[request.features] = wakes[request.features] or {}
  for _, engine in ipairs(reserve(rid, request.prefixes, now) or {}) do
    table.insert(wakes[request.features], engine)
  end
  redis.call('ZADD', SINCE, now, rid)
  count('q', request.features, 1)
  count('tok', request.features, request.cost)
  redis.call('HSET', request_key(rid), 'st', 'queued', 'ep', 0, 'own', '', 'n', 0, 'att', 0,
    'ten', tenant, 'cost', request.cost, 'dl', deadline, 'ct', now, 'eid', eid,
    'pr', request.priority, 'sub', sid, 'body', ARGV[3 + i], 'sz', request.bytes,
    'ft', request.features, 'pt', request.prompt, 'enc', request.encodes or 0)
  if key then
    redis.call('HSET', request_key(rid), 'key', key, 'tpm', args.tokens_per_minute or 0,
      'share', request.share)
  end
  redis.call('ZADD', DEADLINES, request.timeout and deadline or now + args.live_ttl, rid)
end
redis.call('HSET', submission_key(sid), 'ten', tenant, 'man', ARGV[2], 'num', num_requests,
  'left', num_requests, 'by', args.nonce, 'gr', args.grace or '', 'sz', args.kept_bytes, 'acc', args.account)
if args.keep then
  redis.call('HSET', submission_key(sid), 'keep', args.keep, 'in', ARGV[3], 'base', args.base_bytes,
    'tb', args.token_bytes)
end
count_bytes(tenant, bytes)
if args.grace then redis.call('ZADD', ABANDONED, now + args.grace, sid) end
if redis.call('HINCRBY', ADMISSION, 't:' .. tenant, num_requests) == num_requests then
  redis.call('HINCRBY', ADMISSION, 'tens', 1)
end
if key then
  redis.call('HINCRBY', ADMISSION, 'k:' .. key, num_requests)
  use(tokens_meter, args.tokens_per_minute, metered)
end
queued, tokens = queued + num_requests, tokens + cost
if idem then
  redis.call('HSET', idem, 'sub', sid, 'fpr', args.fingerprint)
  redis.call('PEXPIRE', idem, args.idempotency_ttl)
  -- An earlier record of this key may have expired while its bytes still count.
  local expires_at = now + args.idempotency_ttl
  if count_until(expires_at, args.idempotency_bytes, tenant, args.idempotency) then
    count_bytes(tenant, args.idempotency_bytes)
  end
end
for needed, holders in pairs(wakes) do
  wake(needed, '', 'w', holders)
  if #holders > 0 then wake(needed, '', 'w') end -- takes what no holder takes in time
end
return reply('ok')
