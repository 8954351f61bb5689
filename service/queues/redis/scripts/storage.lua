-- Stored bytes, and how long ended submissions are kept. See admission.py and memory/submissions.py.
-- Reads args.window.
local ABANDONED, STORED, GONE = PREFIX .. 'left', PREFIX .. 'stored', PREFIX .. 'gone'
local KEEPERS = PREFIX .. 'keepers'
local LENT = PREFIX .. 'lent' -- limit -> what other shards may use of this one's share

local function lent(name) return num(redis.call('HGET', LENT, name)) end

local function kept_key(tenant) return PREFIX .. 'kept:' .. tenant end

-- Stored bytes of a tenant's submissions; `by` may be negative.
local function count_bytes(tenant, by)
  for _, field in ipairs({ 'all', 't:' .. tenant }) do
    if redis.call('HINCRBY', STORED, field, by) == 0 then redis.call('HDEL', STORED, field) end
  end
end
-- Bytes that are counted until a time, when `sweep` subtracts them. Returns whether they are new.
local function count_until(time, bytes, tenant, what)
  return redis.call('ZADD', GONE, time, bytes .. ' ' .. tenant .. ' ' .. what) == 1
end

-- Calls a command on each key of a submission: its requests, their journals, and its own.
local function each_key(sid, command, ...)
  for i = 0, num(redis.call('HGET', submission_key(sid), 'num')) - 1 do
    redis.call(command, request_key(sid .. '.' .. i), ...)
    redis.call(command, journal_key(sid .. '.' .. i), ...)
  end
  redis.call(command, submission_key(sid), ...)
end

-- Deletes an ended submission in `ttl` ms; its own bytes count until then. Returns its entry in GONE,
-- its tenant and its bytes.
local function expire_submission(sid, ttl)
  local sub = redis.call('HMGET', submission_key(sid), 'ten', 'sz')
  each_key(sid, 'PEXPIRE', ttl)
  redis.call('ZREM', ABANDONED, sid)
  if not sub[2] then return nil end
  count_until(now_ms() + ttl, sub[2], sub[1], sid)
  return sub[2] .. ' ' .. sub[1] .. ' ' .. sid, sub[1], sub[2]
end

-- Starts the time for which an ended submission can be read. If that is longer than the resume window,
-- the bytes of its answers count, too, and it may be evicted.
local function keep_submission(sid)
  local key = submission_key(sid)
  local sub = redis.call('HMGET', key, 'num', 'ten', 'keep', 'tb')
  if not sub[3] then return expire_submission(sid, args.window) end
  if sub[4] then
    local bytes = 0
    for i = 0, num(sub[1]) - 1 do
      bytes = bytes + num(redis.call('HGET', request_key(sid .. '.' .. i), 'n')) * sub[4]
    end
    redis.call('HDEL', key, 'tb')
    redis.call('HINCRBY', key, 'sz', bytes)
    count_bytes(sub[2], bytes)
  end
  local entry, tenant, size = expire_submission(sid, math.max(args.window, num(sub[3])))
  if entry and redis.call('ZADD', kept_key(tenant), now_ms() + args.window, entry) == 1 then
    redis.call('ZINCRBY', KEEPERS, size, tenant)
  end
end

-- An entry of GONE is no longer kept.
local function unkeep(entry, tenant, bytes)
  if redis.call('ZREM', kept_key(tenant), entry) == 0 then return end
  if num(redis.call('ZINCRBY', KEEPERS, -bytes, tenant)) <= 0 then
    redis.call('ZREM', KEEPERS, tenant)
  end
end

-- Ends the keeping of a tenant's oldest kept submission: deletes it if its resume window is over,
-- otherwise it is kept until then, without its input. Returns false if there is none.
local function evict(tenant)
  local entry, over = unpack(redis.call('ZRANGE', kept_key(tenant), 0, 0, 'WITHSCORES'))
  if not entry then return false end
  local bytes, sid = string.match(entry, '^(%d+) %S+ (%S+)$')
  unkeep(entry, tenant, bytes)
  local counted = redis.call('ZREM', GONE, entry) == 1
  if counted then count_bytes(tenant, -bytes) end
  local left, key = num(over) - now_ms(), submission_key(sid)
  if left <= 0 then
    each_key(sid, 'DEL')
  elseif counted and redis.call('EXISTS', key) == 1 then
    local size = redis.call('HGET', key, 'base')
    redis.call('HDEL', key, 'keep', 'in')
    redis.call('HSET', key, 'sz', size)
    count_bytes(tenant, size)
    expire_submission(sid, left)
  end
  return true
end

-- Evicts what is kept until `fits()`: of one tenant or, without it, of the one that keeps most.
local function make_room(fits, tenant)
  for _ = 1, MAX_EVICTED do
    if fits() then return true end
    local keeper = tenant or redis.call('ZREVRANGE', KEEPERS, 0, 0)[1]
    if not keeper or not evict(keeper) then return false end
  end
  return fits()
end
