#!lua flags=allow-oom
-- Hands up to `limit` requests to an engine: by priority, of one priority orphans before new ones, and
-- these by their turn; up to `most` in all if it is the turn of tenants that have less than others.
-- ARGV: consumer, owner, numeric class, limit, lease, max attempts, look for orphans (0 1),
--   replay (0 1), live ttl, resume window, record of a deadline, record of a crash loop,
--   the engine's report of itself, most, its features (separated by spaces), how long an engine's
--   blame is kept. Times in ms.
-- Replies {claims, reclaimed, dropped, ended at their deadline, ended for their crashes}; a claim is
--   {id, epoch, engine deaths, milliseconds left ('' without a deadline), milliseconds that it waited
--   ('' if it was claimed before), body, number of tokens up to which it is isolated ('' if it is
--   not), journal values...}.
local consumer, owner, class, limit = ARGV[1], ARGV[2], ARGV[3], num(ARGV[4])
local lease, max_attempts, live_ttl, window = num(ARGV[5]), num(ARGV[6]), num(ARGV[9]), ARGV[10]
local now, most, keep_blame = now_ms(), num(ARGV[14]), ARGV[16]
local claims, reclaimed, dropped, overdue, crashed = {}, 0, 0, 0, 0
if note_alive(consumer, ARGV[13]) then take_blame_back(consumer, lease) end

local features = {}
for _, name in ipairs(names_in(ARGV[15])) do features[name] = true end
local function has_all(line)
  for _, name in ipairs(names_in(line)) do
    if not features[name] then return false end
  end
  return true
end
local lines = { '' }
for _, line in ipairs(redis.call('SMEMBERS', LINES)) do
  if has_all(line) then lines[#lines + 1] = line end
end

local function hand_out(r, epoch)
  local body = redis.call('HGET', request_key(r.rid), 'body') or ''
  local waited = num(epoch) == 1 and math.max(0, now - r.ct) or ''
  local claim = { r.rid, epoch, r.att, r.dl > 0 and math.max(0, r.dl - now) or '', waited, body,
    r.iso and r.dp + MARGIN or '' }
  if r.n > 0 then
    for _, entry in ipairs(redis.call('XRANGE', journal_key(r.rid), '-', '+')) do
      if entry[2][1] == 'k' then claim[#claim + 1] = entry[2][2] end
    end
  end
  claims[#claims + 1] = claim
end

local function give(r)
  local epoch = redis.call('HINCRBY', request_key(r.rid), 'ep', 1)
  redis.call('HSET', request_key(r.rid), 'st', 'running', 'own', owner, 'cls', class, 'ld', now + lease)
  hand_out(r, epoch)
end

local function may_run(r) return (r.n == 0 or r.cls == class) and has_all(r.ft) end

-- A verdict is final, so it waits until the engine has been silent for longer than a freeze lasts.
local FINAL_SILENCE = 4

-- Finds out why the lease of a request is over. Replies whether the request can go on.
local function settle_orphan(r)
  local engine = engine_of(r)
  if r.own == '' or engine == consumer then return true end -- released; or late itself, not dead
  local silence = silence_of(engine)
  if now - silence > r.ld then return true end -- heard of since: late, not dead
  if silence < lease then
    set_idle(r, consumer, silence) -- look again when it is over
    return false
  end
  local _, failed = judge(r, max_attempts)
  if failed and not is_bystander(r) and silence < FINAL_SILENCE * lease then
    set_idle(r, consumer, math.max(0, silence - (FINAL_SILENCE - 1) * lease))
    return false
  end
  if not count_death(r, max_attempts, keep_blame) then return true end
  crashed = crashed + 1
  stop_request(r, ARGV[12], window)
  return false
end

local function take(priority, eid, fields)
  local r = fields[1] == 'rid' and load(fields[2])
  if not r or r.st == 'ended' or r.eid ~= eid or r.pr ~= tostring(priority) then
    if not r or r.st ~= 'ended' then dropped = dropped + 1 end
    redis.call('XACK', queue_key(priority), GROUP, eid)
    redis.call('XDEL', queue_key(priority), eid)
    return
  end
  if now >= last_moment(r, live_ttl) then
    if r.st == 'queued' then -- it was delivered just now
      redis.call('XACK', queue_key(priority), GROUP, eid)
      redis.call('XDEL', queue_key(priority), eid)
    end
    overdue = overdue + 1
    return stop_request(r, ARGV[11], window)
  end
  if r.st == 'running' and r.own ~= '' and r.ld > now then
    return set_idle(r, consumer, math.max(0, lease - r.ld + now))
  end
  if not may_run(r) then return set_idle(r, consumer, lease + 1) end
  if r.st == 'running' then
    if not settle_orphan(r) then return end
    if r.att > 0 then return leave_to_others(r, consumer, lease) end
    leave_lane(r)
    reclaimed = reclaimed + 1
  else
    leave_queue(r)
    redis.call('HINCRBY', ADMISSION, 'run', 1)
    redis.call('HINCRBY', ADMISSION, 'r:' .. r.ten, 1)
  end
  give(r)
end

-- What is isolated now: the number of requests, whether another engine runs them, whether one of them
-- has its last attempt, and whether one is not yet past the position of the death.
local function isolated()
  local count, elsewhere, last, young = 0, false, false, false
  local members = redis.call('HGETALL', LANE)
  for i = 1, #members, 2 do
    local r = load(members[i])
    if not (r and r.st == 'running' and r.iso) then
      redis.call('HDEL', LANE, members[i])
    elseif r.own ~= '' and r.ld > now then
      count = count + 1
      elsewhere = elsewhere or members[i + 1] ~= consumer
      last = last or r.att + 1 >= max_attempts
      young = young or r.n <= r.dp + PASSED
    end
  end
  return count, elsewhere, last, young
end

local function waiting_suspects()
  local found = {}
  for _, rid in ipairs(redis.call('ZRANGE', SUSPECTS, 0, 255)) do
    local r = load(rid)
    if not r or r.st ~= 'running' or r.own ~= '' or r.att == 0 then
      redis.call('ZREM', SUSPECTS, rid)
    elseif now >= last_moment(r, live_ttl) then
      overdue = overdue + 1
      stop_request(r, ARGV[11], window)
    elseif may_run(r) then
      found[#found + 1] = r
    end
  end
  return found
end

-- Milliseconds after which the engine that isolates may take the next group even if the first one has
-- not got so far: a long prompt takes its time.
local JOIN_AFTER = 2000

-- Takes the next suspects, if no other engine isolates any: half of those that wait, so that a request
-- that kills engines takes only half of the others with it; for its last attempt each comes alone.
local function isolate()
  if #claims >= limit or redis.call('EXISTS', SUSPECTS) == 0 then return end
  local count, elsewhere, last, young = isolated()
  young = young and now - num(redis.call('GET', isolates_key(consumer))) < JOIN_AFTER
  if count > 0 and (elsewhere or last or young) then return end
  local group, suspects = {}, waiting_suspects()
  if #suspects == 0 then return end
  if suspects[1].att + 1 >= max_attempts then
    if count == 0 then group = { suspects[1] } end
  else
    for _, r in ipairs(suspects) do
      if r.att + 1 < max_attempts then group[#group + 1] = r end
    end
    for i = #group, math.min(math.ceil(#group / 2), limit - #claims) + 1, -1 do group[i] = nil end
  end
  for _, r in ipairs(group) do
    redis.call('ZREM', SUSPECTS, r.rid)
    redis.call('HSET', LANE, r.rid, consumer)
    redis.call('HSET', request_key(r.rid), 'iso', 1)
    redis.call('SET', isolates_key(consumer), now, 'PX', keep_blame)
    set_idle(r, consumer, 0)
    r.iso, reclaimed = true, reclaimed + 1
    give(r)
  end
end

-- What this very call took before its reply was lost.
local function replay(priority)
  local queue = queue_key(priority)
  for _, pending in ipairs(grouped(priority, 'XPENDING', queue, GROUP, '-', '+', 10000, consumer)) do
    local entry = redis.call('XRANGE', queue, pending[1], pending[1])[1]
    local r = entry and load(entry[2][2])
    if r and r.own == owner and r.st == 'running' then hand_out(r, num(r.ep)) end
  end
end

local function orphans(priority)
  local cursor = '0-0'
  while #claims < limit do
    local reply = grouped(priority, 'XAUTOCLAIM', queue_key(priority), GROUP, consumer, lease, cursor,
      'COUNT', limit - #claims)
    for _, entry in ipairs(reply[2]) do take(priority, entry[1], entry[2]) end
    cursor = reply[1]
    if cursor == '0-0' then return end
  end
end

local function below_share(tenant)
  local running = num(redis.call('HGET', ADMISSION, 'r:' .. tenant)) + 1
  return running * num(redis.call('HGET', ADMISSION, 'tens')) <= num(redis.call('HGET', ADMISSION, 'run'))
end

-- The place of the one to take: whose turn it is or, for a full engine, the first of those below
-- their share; at most FEW are looked at, because a flood stands behind one another.
local FEW = 16
local function next_place(priority)
  local full, found, line_of, least = #claims >= limit, nil, nil, nil
  for _, line in ipairs(lines) do
    local places = redis.call('ZRANGE', turns_key(priority, line), 0, full and FEW - 1 or 0, 'WITHSCORES')
    for i = 1, #places, 2 do
      local turn, rid = num(places[i + 1]), string.match(places[i], ' (.*)$') or ''
      if found and turn >= least then break end
      local tenant = not full or redis.call('HGET', request_key(rid), 'ten')
      if tenant and (not full or below_share(tenant)) then
        found, line_of, least = places[i], line, turn
      end
    end
  end
  return found, line_of, least
end

-- Puts it into the stream, where it stays until its end. Replies whether there was one.
local function bring(priority)
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
  while #claims < most do
    local brought = bring(priority)
    local reply = grouped(priority, 'XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', most - #claims,
      'STREAMS', queue_key(priority), '>')
    for _, entry in ipairs(reply and reply[1][2] or {}) do take(priority, entry[1], entry[2]) end
    if not (brought or reply) then return end
  end
end

for priority = 0, 2 do
  if ARGV[8] == '1' then replay(priority) end
end
for priority = 0, 2 do
  if ARGV[7] == '1' then orphans(priority) end
  isolate()
  fresh(priority)
end
return { claims, reclaimed, dropped, overdue, crashed }
