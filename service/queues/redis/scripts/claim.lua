#!lua flags=allow-oom
-- Hands up to `limit` requests to an engine: by priority, in one priority orphans before new ones, and
-- these by their turn; up to `most` in all if the next are of tenants below their share.
-- args: engine, running (requests of the engine), owner, kind (see mail.lua), report (the engine's),
--   limit, most, orphans (ms between two looks for them by engines of this kind; absent: none), waits (ms
--   for which it waits if it gets nothing; absent: it does not), replay, lease, max_attempts, live_ttl,
--   window, keep_blame.
-- Returns {claims, reclaimed, dropped, overdue, crashed, ms until a request that is left to other engines
--   is free (-1: there is none), engines of its kind that wait (0: it does not)}. A claim is {id, epoch,
--   engine deaths, ms left
--   ('': no deadline), ms that it waited ('': it was claimed before), body, number of tokens up to which
--   it is isolated ('': it is not), journal values...}.
local engine, limit, lease, now = args.engine, args.limit, args.lease, now_ms()
local claims, reclaimed, dropped, overdue, crashed = {}, 0, 0, 0, 0
note_alive(engine, args.report)

local class, features = string.match(args.kind, '^(.*)\n(.*)$')
local seeks_orphans = args.orphans and limit > 0 and may_seek_orphans(args.kind, args.orphans)
local lines = { '' }
for _, line in ipairs(redis.call('SMEMBERS', LINES)) do
  if has_all(features, line) then lines[#lines + 1] = line end
end

local function hand_out(r, epoch)
  local body = redis.call('HGET', request_key(r.rid), 'body') or ''
  local waited = epoch == 1 and math.max(0, now - r.ct) or ''
  local claim = { r.rid, epoch, r.att, r.dl > 0 and math.max(0, r.dl - now) or '', waited, body,
    r.iso and r.dp + CLEARED_AFTER or '' }
  if r.n > 0 then
    for _, entry in ipairs(redis.call('XRANGE', journal_key(r.rid), '-', '+')) do
      if entry[2][1] == 'k' then claim[#claim + 1] = entry[2][2] end
    end
  end
  claims[#claims + 1] = claim
end

local function grant(r)
  local epoch = redis.call('HINCRBY', request_key(r.rid), 'ep', 1)
  redis.call('HSET', request_key(r.rid), 'st', 'running', 'own', args.owner, 'cls', class,
    'ld', now + lease)
  hand_out(r, epoch)
end

local function may_run(r) return (r.n == 0 or r.cls == class) and has_all(features, r.ft) end
local function is_held(r) return r.st == 'running' and r.own ~= '' and r.ld > now end
local function has_last_attempt(r) return r.att + 1 >= args.max_attempts end

local function expire(r)
  overdue = overdue + 1
  stop_request(r, DEADLINE)
end

-- Finds out why the lease of a request is over. Returns whether the request can be continued.
local function settle_orphan(r)
  local owner = engine_of(r)
  if r.own == '' or owner == engine then return true end -- released; or late itself, not dead
  local silence = silence_of(owner)
  if now - silence > r.ld then return true end -- sent a heartbeat since: late, not dead
  if silence < lease then
    set_idle(r, engine, silence) -- look again when it is over
    return false
  end
  local _, failed = judge(r)
  if failed and not is_bystander(r) and silence < FINAL_SILENCE * lease then
    set_idle(r, engine, math.max(0, silence - (FINAL_SILENCE - 1) * lease))
    return false
  end
  if not count_death(r) then return true end
  crashed = crashed + 1
  stop_request(r, CRASH_LOOP)
  return false
end

local function take(priority, eid, fields)
  local r = fields[1] == 'rid' and load(fields[2])
  if not r or r.st == 'ended' or r.eid ~= eid or r.pr ~= tostring(priority) then
    if not r or r.st ~= 'ended' then dropped = dropped + 1 end
    return leave_stream(priority, eid)
  end
  if now >= expires(r) then
    if r.st == 'queued' then leave_stream(priority, eid) end -- it was delivered just now
    return expire(r)
  end
  if is_held(r) then return set_idle(r, engine, math.max(0, lease - r.ld + now)) end
  if not may_run(r) then return set_idle(r, engine, lease + 1) end
  if r.st == 'running' then
    if not settle_orphan(r) then return end
    if r.att > 0 then return release(r, engine) end
    leave_lane(r)
    reclaimed = reclaimed + 1
  else
    leave_queue(r)
    count('run', r.ft, 1)
    redis.call('HINCRBY', ADMISSION, 'r:' .. r.ten, 1)
  end
  grant(r)
end

-- Returns the number of isolated requests, and whether none may join them in this engine.
local function lane_state()
  local count, closed, young = 0, false, false
  local members = redis.call('HGETALL', LANE)
  for i = 1, #members, 2 do
    local r = load(members[i])
    if not (r and r.st == 'running' and r.iso) then
      redis.call('HDEL', LANE, members[i])
    elseif is_held(r) then
      count = count + 1
      closed = closed or members[i + 1] ~= engine or has_last_attempt(r)
      young = young or r.n <= r.dp + PASSED_AFTER
    end
  end
  young = young and now - num(redis.call('GET', isolates_key(engine))) < JOIN_AFTER
  return count, closed or young
end

local function waiting_suspects()
  local found = {}
  for _, rid in ipairs(redis.call('ZRANGE', SUSPECTS, 0, 255)) do
    local r = load(rid)
    if not r or r.st ~= 'running' or r.own ~= '' or r.att == 0 then
      redis.call('ZREM', SUSPECTS, rid)
    elseif now >= expires(r) then
      expire(r)
    elseif may_run(r) then
      found[#found + 1] = r
    end
  end
  return found
end

-- Isolates the next suspects if the lane is free: half of those that wait, so that a request that
-- kills engines takes only half of the others with it, or a single-request probe.
local function isolate()
  if #claims >= limit or redis.call('EXISTS', SUSPECTS) == 0 then return end
  local count, closed = lane_state()
  if closed then return end
  local group, suspects = {}, waiting_suspects()
  if #suspects == 0 then return end
  if has_last_attempt(suspects[1]) then
    if count == 0 then group = { suspects[1] } end
  else
    for _, r in ipairs(suspects) do
      if not has_last_attempt(r) then group[#group + 1] = r end
    end
    for i = #group, math.min(math.ceil(#group / 2), limit - #claims) + 1, -1 do group[i] = nil end
  end
  for _, r in ipairs(group) do
    redis.call('ZREM', SUSPECTS, r.rid)
    redis.call('HSET', LANE, r.rid, engine)
    redis.call('HSET', request_key(r.rid), 'iso', 1)
    redis.call('SET', isolates_key(engine), now, 'PX', args.keep_blame)
    set_idle(r, engine, 0)
    r.iso, reclaimed = true, reclaimed + 1
    grant(r)
  end
end

-- Hands out again what this very call claimed before its reply was lost.
local function replay(priority)
  local queue = queue_key(priority)
  for _, pending in ipairs(grouped(priority, 'XPENDING', queue, GROUP, '-', '+', 10000, engine)) do
    local entry = redis.call('XRANGE', queue, pending[1], pending[1])[1]
    local r = entry and load(entry[2][2])
    if r and r.own == args.owner and r.st == 'running' then hand_out(r, r.ep) end
  end
end

local function orphans(priority)
  local cursor = '0-0'
  if #claims >= limit then return end
  while #claims < limit do
    local reply = grouped(priority, 'XAUTOCLAIM', queue_key(priority), GROUP, engine, lease, cursor,
      'COUNT', limit - #claims)
    for _, entry in ipairs(reply[2]) do take(priority, entry[1], entry[2]) end
    cursor = reply[1]
    if cursor == '0-0' then return end
  end
  redis.call('DEL', PREFIX .. 'looked:' .. args.kind) -- there may be more, for other engines of its kind
  wake(features, class, 'r')
end

local function is_below_share(tenant)
  local counts = redis.call('HMGET', ADMISSION, 'r:' .. tenant, 'tens', 'run')
  return (num(counts[1]) + 1) * num(counts[2]) <= num(counts[3])
end

-- The queued request to take: the one whose turn it is or, for a full engine, the first one of a tenant
-- below its share. Those that are left to other engines are passed over. At most FEW are examined,
-- because a flood queues up behind itself.
local FEW = 16
local has_reserved, free_in = redis.call('EXISTS', RESERVED) == 1, -1
local function is_free(rid)
  local left = has_reserved and left_for(rid, engine, args.running)
  if left then free_in = free_in < 0 and left or math.min(free_in, left) end
  return not left
end
local function next_place(priority)
  local full, found, line_of, least = #claims >= limit, nil, nil, nil
  for _, line in ipairs(lines) do
    local places = redis.call('ZRANGE', turns_key(priority, line), 0,
      (full or has_reserved) and FEW - 1 or 0, 'WITHSCORES')
    for i = 1, #places, 2 do
      local turn, rid = num(places[i + 1]), string.match(places[i], ' (.*)$') or ''
      if found and turn >= least then break end
      local tenant = not full or redis.call('HGET', request_key(rid), 'ten')
      if tenant and (not full or is_below_share(tenant)) and is_free(rid) then
        found, line_of, least = places[i], line, turn
        break
      end
    end
  end
  return found, line_of, least
end

-- Moves it into the stream, until its end. Returns whether there was one.
local function move_next(priority)
  local place, line, turn = next_place(priority)
  if not place then return false end
  local rid = string.match(place, ' (.*)$') or place
  leave_line({ pr = priority, ft = line, eid = place })
  local eid = redis.call('XADD', queue_key(priority), '*', 'rid', rid)
  if load(rid) then redis.call('HSET', request_key(rid), 'eid', eid) end
  if turn > num(redis.call('HGET', ADMISSION, 'now')) then
    redis.call('HSET', ADMISSION, 'now', string.format('%.0f', turn))
  end
  return true
end

local function fresh(priority)
  while #claims < args.most do
    local moved = move_next(priority)
    local reply = grouped(priority, 'XREADGROUP', 'GROUP', GROUP, engine, 'COUNT', args.most - #claims,
      'STREAMS', queue_key(priority), '>')
    for _, entry in ipairs(reply and reply[1][2] or {}) do take(priority, entry[1], entry[2]) end
    if not (moved or reply) then return end
  end
end

-- Wakes other engines for what this one has no room for.
local function pass_on()
  for _, line in ipairs({ '', unpack(redis.call('SMEMBERS', LINES)) }) do
    for priority = 0, 2 do
      if redis.call('EXISTS', turns_key(priority, line)) == 1 then
        wake(line, '', 'w')
        break
      end
    end
  end
end

redis.call('ZREM', waiting_key(args.kind), engine) -- it does not wait now
for priority = 0, 2 do
  if args.replay then replay(priority) end
end
if seeks_orphans or redis.call('EXISTS', SINCE, SUSPECTS) > 0 then
  for priority = 0, 2 do
    if seeks_orphans then orphans(priority) end
    isolate()
    fresh(priority)
  end
  if #claims >= limit then pass_on() end
end
local waits = args.waits and limit > 0 and #claims == 0
local waiting = waits and wait_for_work(args.kind, engine) or 0
return { claims, reclaimed, dropped, overdue, crashed, free_in, waiting }
