-- Deaths of engines and what they count against; see contract.py for the rules. `by` names the engines
-- that died while they ran a request at `dp` tokens, and `att` is their number. A suspect waits in
-- SUSPECTS, by the time of the death, until an engine isolates it. Reads args.lease, args.max_attempts
-- and args.keep_blame.
local function blamed_key(engine) return PREFIX .. 'blamed:' .. engine end

local function names_in(text)
  local names = {}
  for name in string.gmatch(text, '%S+') do names[#names + 1] = name end
  return names
end

local function is_bystander(r)
  return not r.iso and redis.call('EXISTS', isolates_key(engine_of(r))) == 1
end

-- Returns the engines whose deaths count against a request once its own has died, and whether that
-- fails it: it was the last attempt, and that produced no token more than the one before.
local function judge(r)
  local near = r.dp >= 0 and r.n <= r.dp + CLEARED_AFTER
  local names = near and names_in(r.by) or {}
  names[#names + 1] = engine_of(r)
  return names, #names >= args.max_attempts and not (near and r.n > r.dp)
end

-- Counts the death of the engine that ran a request. Returns whether the request has to be failed.
local function count_death(r)
  if is_bystander(r) then return false end
  local names, failed = judge(r)
  while not failed and #names >= args.max_attempts and #names > 1 do table.remove(names, 1) end
  local engine = engine_of(r)
  set_blame(r, names)
  redis.call('HSET', request_key(r.rid), 'dp', r.n)
  redis.call('HINCRBY', request_key(r.rid), 'deaths', 1)
  redis.call('SADD', blamed_key(engine), r.rid)
  redis.call('PEXPIRE', blamed_key(engine), args.keep_blame)
  leave_lane(r, true)
  return failed
end

-- Releases a running request to the next engine: a suspect to one that may isolate it.
local function release(r, consumer)
  leave_lane(r)
  redis.call('HSET', request_key(r.rid), 'own', '', 'ld', now_ms())
  if r.att > 0 then redis.call('ZADD', SUSPECTS, 'NX', now_ms(), r.rid) end
  set_idle(r, consumer, r.att > 0 and 0 or args.lease + 1)
end

-- The engine is alive, so its death was counted by mistake.
local function take_blame_back(engine)
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
        if redis.call('ZREM', SUSPECTS, rid) == 1 then set_idle(r, engine, args.lease + 1) end
      end
    end
  end
  redis.call('DEL', blamed_key(engine))
  forget_isolation(engine)
end

-- A heartbeat of an engine, with its report if it sent one.
local function note_alive(engine, report)
  local key = PREFIX .. 'engines'
  report = report or string.match(redis.call('HGET', key, engine) or '', '^%d+ (.*)$')
  if report then redis.call('HSET', key, engine, now_ms() .. ' ' .. report) end
  if redis.call('EXISTS', blamed_key(engine)) == 1 then take_blame_back(engine) end
end

local function silence_of(engine)
  return now_ms() - num(string.match(redis.call('HGET', PREFIX .. 'engines', engine) or '', '^%d+'))
end
