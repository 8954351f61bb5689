#!lua flags=allow-oom
-- Hands up to `limit` requests to an engine: by priority, of one priority orphans before new ones, and
-- these by their turn; up to `most` in all where it is the turn of tenants that have less than others.
-- ARGV: consumer, owner, numeric class, limit, lease, max attempts, look for orphans (0 1),
--   replay (0 1), live ttl, resume window, record of a deadline, record of a crash loop,
--   what the engine tells of itself, most. Times in ms.
-- Replies {claims, reclaimed, dropped, ended at their deadline, ended for their crashes}; a claim is
--   {id, epoch, engine deaths, milliseconds left ('' without a deadline), milliseconds that it waited
--   ('' where it was claimed before), body, journal values...}.
local consumer, owner, class, limit = ARGV[1], ARGV[2], ARGV[3], num(ARGV[4])
local lease, max_attempts, live_ttl, window = num(ARGV[5]), num(ARGV[6]), num(ARGV[9]), ARGV[10]
local now, most = now_ms(), num(ARGV[14])
local claims, reclaimed, dropped, overdue, crashed = {}, 0, 0, 0, 0
redis.call('HSET', PREFIX .. 'engines', consumer, now .. ' ' .. ARGV[13])

local function hand_out(r, epoch)
  local body = redis.call('HGET', request_key(r.rid), 'body') or ''
  local waited = num(epoch) == 1 and math.max(0, now - r.ct) or ''
  local claim = { r.rid, epoch, r.att, r.dl > 0 and math.max(0, r.dl - now) or '', waited, body }
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
    overdue = overdue + 1
    return stop_request(r, ARGV[11], window)
  end
  if r.st == 'running' then
    if r.own ~= '' and r.ld > now then return set_idle(r, consumer, math.max(0, lease - r.ld + now)) end
    if r.n > 0 and r.cls ~= class then return set_idle(r, consumer, lease + 1) end
    -- An engine that takes its own request back was late, not dead.
    if r.own ~= '' and string.sub(r.own, 1, #consumer + 1) ~= consumer .. ':' then
      r.att = redis.call('HINCRBY', request_key(r.rid), 'att', 1)
      if r.att >= max_attempts then
        crashed = crashed + 1
        return stop_request(r, ARGV[12], window)
      end
    end
    reclaimed = reclaimed + 1
  else
    leave_queue(r)
    redis.call('HINCRBY', ADMISSION, 'run', 1)
    redis.call('HINCRBY', ADMISSION, 'r:' .. r.ten, 1)
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

local function below_share(tenant)
  local running = num(redis.call('HGET', ADMISSION, 'r:' .. tenant)) + 1
  return running * num(redis.call('HGET', ADMISSION, 'tens')) <= num(redis.call('HGET', ADMISSION, 'run'))
end

-- The place of the one to take: whose turn it is or, for a full engine, the first of those below
-- their share; at most FEW are looked at, because a flood stands behind one another.
local FEW = 16
local function next_place(priority)
  local full = #claims >= limit
  local places = redis.call('ZRANGE', turns_key(priority), 0, full and FEW - 1 or 0)
  if not full then return places[1] end
  for _, place in ipairs(places) do
    local tenant = redis.call('HGET', request_key(string.match(place, ' (.*)$') or ''), 'ten')
    if tenant and below_share(tenant) then return place end
  end
end

-- Puts it into the stream, where it stays until its end. Replies whether there was one.
local function bring(priority)
  local place = next_place(priority)
  if not place then return false end
  local turn = num(redis.call('ZSCORE', turns_key(priority), place))
  local rid = string.match(place, ' (.*)$') or place
  redis.call('ZREM', turns_key(priority), place)
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
  fresh(priority)
end
return { claims, reclaimed, dropped, overdue, crashed }
