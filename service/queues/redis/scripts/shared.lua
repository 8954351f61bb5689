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
local LINES = PREFIX .. 'lines'
local LANE = PREFIX .. 'lane'
local SUSPECTS = PREFIX .. 'suspects'
local GROUP = 'engines'

local function request_key(rid) return PREFIX .. 'r:' .. rid end
local function journal_key(rid) return PREFIX .. 't:' .. rid end
local function submission_key(sid) return PREFIX .. 's:' .. sid end
local function queue_key(priority) return PREFIX .. 'q' .. priority end
local function turns_key(priority, line) return PREFIX .. 'w' .. priority .. (line == '' and '' or ':' .. line) end
local function num(value) return tonumber(value or 0) or 0 end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The request as a table, or nil where there is none (or something else under its name).
local function load(rid)
  local v = redis.pcall('HMGET', request_key(rid), 'st', 'ep', 'own', 'n', 'ld', 'att', 'cls', 'dl',
    'ct', 'ten', 'cost', 'eid', 'pr', 'sub', 'by', 'dp', 'iso', 'ft')
  if v.err or not v[1] or not v[14] then return nil end
  return { rid = rid, st = v[1], ep = v[2], own = v[3], n = num(v[4]), ld = num(v[5]),
    att = num(v[6]), cls = v[7], dl = num(v[8]), ct = num(v[9]), ten = v[10], cost = num(v[11]),
    eid = v[12], pr = v[13], sub = v[14], by = v[15] or '', dp = tonumber(v[16] or -1),
    iso = v[17] == '1', ft = v[18] or '' }
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

-- A line holds the waiting requests of one priority that need the same features of an engine.
local function leave_line(r)
  redis.call('ZREM', turns_key(r.pr, r.ft), r.eid)
  if r.ft == '' then return end
  for priority = 0, 2 do
    if redis.call('EXISTS', turns_key(priority, r.ft)) == 1 then return end
  end
  redis.call('SREM', LINES, r.ft)
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

-- Sets how long an entry has been idle, so that XAUTOCLAIM finds it when the lease is over.
local function set_idle(r, consumer, idle)
  grouped(r.pr, 'XCLAIM', queue_key(r.pr), GROUP, consumer, 0, r.eid, 'IDLE', idle, 'JUSTID')
end

-- Blame. An answer is a pure function of its request, so a request that kills an engine kills the next
-- one at the same position. `by` names the engines that died while they ran a request at `dp` tokens
-- (`att` is their number). A request with such deaths is a suspect: it runs isolated, as one of few,
-- until it is MARGIN tokens past `dp`, and is then cleared; others join when it is PASSED tokens past it. LANE maps isolated requests to their engine,
-- of which there is one at a time; SUSPECTS are those that wait for it, by the time of the death.
local MARGIN, PASSED = 8, 2
local function engine_of(r) return string.match(r.own, '^(.*):') or '' end
local function isolates_key(engine) return PREFIX .. 'isolates:' .. engine end
local function blamed_key(engine) return PREFIX .. 'blamed:' .. engine end

local function names_in(text)
  local names = {}
  for name in string.gmatch(text, '%S+') do names[#names + 1] = name end
  return names
end

local function set_blame(r, names)
  r.by, r.att = table.concat(names, ' '), #names
  redis.call('HSET', request_key(r.rid), 'by', r.by, 'att', r.att)
end

-- What an engine isolates stays on record while it may be dead: its other requests are not to blame.
local function forget_isolation(engine)
  for _, other in ipairs(redis.call('HVALS', LANE)) do
    if other == engine then return end
  end
  redis.call('DEL', isolates_key(engine))
end

local function leave_lane(r, died)
  if not r.iso then return end
  r.iso = false
  local engine = redis.call('HGET', LANE, r.rid)
  redis.call('HDEL', LANE, r.rid)
  redis.call('HDEL', request_key(r.rid), 'iso')
  if redis.call('EXISTS', LANE) == 0 then redis.call('PUBLISH', WORK, 'lane') end
  if engine and not died then forget_isolation(engine) end
end

local function is_bystander(r)
  return not r.iso and redis.call('EXISTS', isolates_key(engine_of(r))) == 1
end

-- What the death of its engine makes of a request: whom to blame it for and whether it is failed,
-- which it is after its last attempt if not one token more came of that than of the attempt before.
local function judge(r, max_attempts)
  local near = r.dp >= 0 and r.n <= r.dp + MARGIN
  local names = near and names_in(r.by) or {}
  names[#names + 1] = engine_of(r)
  return names, #names >= max_attempts and not (near and r.n > r.dp)
end

-- Counts the death of the engine that ran a request. Replies whether the request has to be failed.
local function count_death(r, max_attempts, keep)
  if is_bystander(r) then return false end
  local names, failed = judge(r, max_attempts)
  while not failed and #names >= max_attempts and #names > 1 do table.remove(names, 1) end
  local engine = engine_of(r)
  set_blame(r, names)
  redis.call('HSET', request_key(r.rid), 'dp', r.n)
  redis.call('HINCRBY', request_key(r.rid), 'deaths', 1)
  redis.call('SADD', blamed_key(engine), r.rid)
  redis.call('PEXPIRE', blamed_key(engine), keep)
  leave_lane(r, true)
  return failed
end

-- Leaves a running request for the next engine: a suspect for the one that may isolate it.
local function leave_to_others(r, consumer, lease)
  leave_lane(r)
  redis.call('HSET', request_key(r.rid), 'own', '', 'ld', now_ms())
  if r.att > 0 then redis.call('ZADD', SUSPECTS, 'NX', now_ms(), r.rid) end
  set_idle(r, consumer, r.att > 0 and 0 or lease + 1)
end

-- An engine gave a sign of life: if its death was counted, that was an error.
local function take_blame_back(engine, lease)
  for _, rid in ipairs(redis.call('SMEMBERS', blamed_key(engine))) do
    local r = load(rid)
    local others, blamed = {}, false
    for _, name in ipairs(names_in(r and r.by or '')) do
      if name == engine then blamed = true else others[#others + 1] = name end
    end
    if blamed and r.st == 'running' then
      set_blame(r, others)
      redis.call('HINCRBY', request_key(rid), 'deaths', -1)
      if r.att == 0 then
        leave_lane(r)
        if redis.call('ZREM', SUSPECTS, rid) == 1 then set_idle(r, engine, lease + 1) end
      end
    end
  end
  redis.call('DEL', blamed_key(engine))
  forget_isolation(engine)
end

-- Notes a sign of life and, if given, what the engine reports of itself.
local function note_alive(engine, report)
  local key = PREFIX .. 'engines'
  report = report or string.match(redis.call('HGET', key, engine) or '', '^%d+ (.*)$')
  if report then redis.call('HSET', key, engine, now_ms() .. ' ' .. report) end
  return redis.call('EXISTS', blamed_key(engine)) == 1
end

local function silence_of(engine)
  return now_ms() - num(string.match(redis.call('HGET', PREFIX .. 'engines', engine) or '', '^%d+'))
end

-- Writes the one terminal record. What waits has its place among the turns, what runs has an entry in
-- the stream: `eid` is the one or the other.
local function end_request(r, payload, window)
  if r.st == 'queued' then
    leave_line(r)
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
  if r.att > 0 or r.iso then
    redis.call('ZREM', SUSPECTS, r.rid)
    leave_lane(r)
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
