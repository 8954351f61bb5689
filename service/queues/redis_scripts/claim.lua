#!lua flags=allow-oom
-- Hands up to `limit` requests to an engine: by priority, of one priority orphans before new ones.
-- ARGV: consumer, owner, numeric class, limit, lease, max attempts, look for orphans (0 1),
--   replay (0 1), live ttl, resume window, record of a deadline, record of a crash loop,
--   what the engine tells of itself. Times in ms.
-- Replies {claims, reclaimed, dropped}; a claim is {id, epoch, engine deaths, milliseconds left
--   ('' without a deadline), body, journal values...}.
local consumer, owner, class, limit = ARGV[1], ARGV[2], ARGV[3], num(ARGV[4])
local lease, max_attempts, live_ttl, window = num(ARGV[5]), num(ARGV[6]), num(ARGV[9]), ARGV[10]
local now = now_ms()
local claims, reclaimed, dropped = {}, 0, 0
redis.call('HSET', PREFIX .. 'engines', consumer, now .. ' ' .. ARGV[13])

local function hand_out(r, epoch)
  local body = redis.call('HGET', request_key(r.rid), 'body') or ''
  local claim = { r.rid, epoch, r.att, r.dl > 0 and math.max(0, r.dl - now) or '', body }
  if r.n > 0 then
    for _, entry in ipairs(redis.call('XRANGE', journal_key(r.rid), '-', '+')) do
      if entry[2][1] == 'k' then claim[#claim + 1] = entry[2][2] end
    end
  end
  claims[#claims + 1] = claim
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
    return stop_request(r, ARGV[11], window)
  end
  if r.st == 'running' then
    if r.own ~= '' and r.ld > now then return set_idle(r, consumer, math.max(0, lease - r.ld + now)) end
    if r.n > 0 and r.cls ~= class then return set_idle(r, consumer, lease + 1) end
    -- An engine that takes its own request back was late, not dead.
    if r.own ~= '' and string.sub(r.own, 1, #consumer + 1) ~= consumer .. ':' then
      r.att = redis.call('HINCRBY', request_key(r.rid), 'att', 1)
      if r.att >= max_attempts then return stop_request(r, ARGV[12], window) end
    end
    reclaimed = reclaimed + 1
  else
    leave_queue(r)
    redis.call('HINCRBY', ADMISSION, 'run', 1)
  end
  local epoch = redis.call('HINCRBY', request_key(r.rid), 'ep', 1)
  redis.call('HSET', request_key(r.rid), 'st', 'running', 'own', owner, 'cls', class, 'ld', now + lease)
  hand_out(r, epoch)
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

local function fresh(priority)
  local queue = queue_key(priority)
  while #claims < limit do
    local reply = grouped(priority, 'XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', limit - #claims,
      'STREAMS', queue, '>')
    if not reply then return end
    for _, entry in ipairs(reply[1][2]) do take(priority, entry[1], entry[2]) end
  end
end

for priority = 0, 2 do
  if ARGV[8] == '1' then replay(priority) end
end
for priority = 0, 2 do
  if ARGV[7] == '1' then orphans(priority) end
  fresh(priority)
end
return { claims, reclaimed, dropped }
