-- What all scripts share; the loader puts it before each of them.
-- Every script is given one key, the shard's admission hash. Its name carries the shard's tag, the
-- names of all other keys are made from it, and so all of them lie in one slot of a cluster.
local ADMISSION = KEYS[1]
local PREFIX = string.sub(ADMISSION, 1, -4) -- without 'adm'
local DEADLINES = PREFIX .. 'dl'
local SINCE = PREFIX .. 'since'
local DESERTED = PREFIX .. 'left'
local STORED = PREFIX .. 'stored'
local GONE = PREFIX .. 'gone'
local WORK = PREFIX .. 'work'
local STOPS = PREFIX .. 'stops'
local GROUP = 'engines'

local function request_key(rid) return PREFIX .. 'r:' .. rid end
local function journal_key(rid) return PREFIX .. 't:' .. rid end
local function submission_key(sid) return PREFIX .. 's:' .. sid end
local function queue_key(priority) return PREFIX .. 'q' .. priority end
local function turns_key(priority) return PREFIX .. 'w' .. priority end
local function num(value) return tonumber(value or 0) or 0 end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The request as a table, or nil where there is none (or something else under its name).
local function load(rid)
  local v = redis.pcall('HMGET', request_key(rid), 'st', 'ep', 'own', 'n', 'ld', 'att', 'cls', 'dl',
    'ct', 'ten', 'cost', 'eid', 'pr', 'sub')
  if v.err or not v[1] or not v[14] then return nil end
  return { rid = rid, st = v[1], ep = v[2], own = v[3], n = num(v[4]), ld = num(v[5]),
    att = num(v[6]), cls = v[7], dl = num(v[8]), ct = num(v[9]), ten = v[10], cost = num(v[11]),
    eid = v[12], pr = v[13], sub = v[14] }
end

-- A command of the consumer group; makes the group where it is gone, from the stream's beginning:
-- what is delivered a second time is recognised by the request's own state.
local function grouped(priority, ...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err and string.find(reply.err, 'NOGROUP', 1, true) then
    redis.call('XGROUP', 'CREATE', queue_key(priority), GROUP, '0', 'MKSTREAM')
    reply = redis.call(...)
  end
  return reply
end

-- When a request is over its time: at its deadline or, without one, when no engine has held it for
-- `live_ttl` milliseconds.
local function last_moment(r, live_ttl)
  if r.dl > 0 then return r.dl end
  return (r.st == 'queued' and r.ct or r.ld) + live_ttl
end

local function count_down(field, by)
  local left = redis.call('HINCRBY', ADMISSION, field, -by)
  if left == 0 then redis.call('HDEL', ADMISSION, field) end
  return left
end

local function leave_queue(r)
  redis.call('ZREM', SINCE, r.rid)
  count_down('q', 1)
  count_down('tok', r.cost)
end

-- Bytes that are stored of a tenant's submissions; `by` may be negative. See memory_shelf.py.
local function count_bytes(tenant, by)
  for _, field in ipairs({ 'all', 't:' .. tenant }) do
    if redis.call('HINCRBY', STORED, field, by) == 0 then redis.call('HDEL', STORED, field) end
  end
end
-- Bytes that are counted until a time: `sweep` counts them down then. Replies whether they are new.
local function count_until(time, bytes, tenant, what)
  return redis.call('ZADD', GONE, time, bytes .. ' ' .. tenant .. ' ' .. what) == 1
end
-- A submission's own bytes, counted for `window` from now.
local function fade(sid, window)
  local v = redis.call('HMGET', submission_key(sid), 'ten', 'sz')
  if v[2] then count_until(now_ms() + window, v[2], v[1], sid) end
end

-- A key's meter is one number, the time (ms) at which all that was used is given back at a limit's
-- steady rate: see meters.py. It goes by itself when that time is over.
local MINUTE = 60000
local function meter_key(key, unit) return PREFIX .. 'k:' .. key .. ':' .. unit end
local function fraction(ms) return string.format('%.3f', ms) end -- a reply cuts numbers off
local function used_ms(meter) return math.max(0, num(redis.call('GET', meter)) - now_ms()) end
-- How long an amount has to wait, 0 for not at all: fractions of a minute do not come out even.
local function wait_ms(meter, limit, amount)
  if limit == 0 then return 0 end
  local over = used_ms(meter) + amount * MINUTE / limit - MINUTE
  return over > 0.001 and over or 0
end
local function use(meter, limit, amount)
  if limit == 0 then return end
  local now, used = now_ms(), used_ms(meter) + amount * MINUTE / limit
  if used <= 0 then redis.call('DEL', meter)
  else redis.call('SET', meter, fraction(now + used), 'PX', math.ceil(used)) end
end

-- Counts an ended request down for its key, and what it took beyond what admission counted.
local function settle(r)
  local v = redis.call('HMGET', request_key(r.rid), 'key', 'tpm', 'share')
  if not v[1] then return end
  count_down('k:' .. v[1], 1)
  use(meter_key(v[1], 'tokens'), num(v[2]), r.n - num(v[3]))
end

-- Writes the one terminal record. What waits has its place among the turns, what runs has an entry in
-- the stream: `eid` is the one or the other.
local function end_request(r, payload, window)
  if r.st == 'queued' then
    redis.call('ZREM', turns_key(r.pr), r.eid)
    leave_queue(r)
  else
    count_down('run', 1)
    count_down('r:' .. r.ten, 1)
    redis.call('XACK', queue_key(r.pr), GROUP, r.eid)
    redis.call('XDEL', queue_key(r.pr), r.eid)
  end
  if count_down('t:' .. r.ten, 1) == 0 then
    redis.call('HDEL', ADMISSION, 'f:' .. r.ten)
    if count_down('tens', 1) == 0 then redis.call('HDEL', ADMISSION, 'now') end
  end
  settle(r)
  count_bytes(r.ten, -num(redis.call('HGET', request_key(r.rid), 'sz')))
  redis.call('XADD', journal_key(r.rid), r.n .. '-1', 'e', payload)
  redis.call('HSET', request_key(r.rid), 'st', 'ended', 'fin', payload)
  redis.call('HDEL', request_key(r.rid), 'body')
  redis.call('ZREM', DEADLINES, r.rid)
  redis.call('PUBLISH', journal_key(r.rid), r.n .. '-1')
  local sub = submission_key(r.sub)
  if redis.call('HINCRBY', sub, 'left', -1) > 0 then return end
  -- The last one: from now on the resume window runs for all of the submission.
  for i = 0, num(redis.call('HGET', sub, 'num')) - 1 do
    redis.call('PEXPIRE', request_key(r.sub .. '.' .. i), window)
    redis.call('PEXPIRE', journal_key(r.sub .. '.' .. i), window)
  end
  redis.call('PEXPIRE', sub, window)
  fade(r.sub, window)
  redis.call('ZREM', DESERTED, r.sub)
end

-- Ends a request over the head of its engine: the epoch fences that one off.
local function stop_request(r, payload, window)
  redis.call('HINCRBY', request_key(r.rid), 'ep', 1)
  redis.call('HSET', request_key(r.rid), 'own', '')
  if r.st == 'running' and r.own ~= '' then redis.call('PUBLISH', STOPS, r.rid) end
  end_request(r, payload, window)
end

-- Cancels what has not ended of a submission. Replies how many.
local function stop_submission(sid, payload, window)
  local stopped = 0
  for i = 0, num(redis.call('HGET', submission_key(sid), 'num')) - 1 do
    local r = load(sid .. '.' .. i)
    if r and r.st ~= 'ended' then
      stop_request(r, payload, window)
      stopped = stopped + 1
    end
  end
  return stopped
end

-- Sets how long an entry has been idle, so that XAUTOCLAIM finds it when the lease is over.
local function set_idle(r, consumer, idle)
  grouped(r.pr, 'XCLAIM', queue_key(r.pr), GROUP, consumer, 0, r.eid, 'IDLE', idle, 'JUSTID')
end
