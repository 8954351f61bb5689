#!lua flags=allow-oom
-- Ends what is over its time and what is deserted, counts down the bytes of what is gone, and forgets
-- engines that are long gone.
-- ARGV: payload, resume window, live ttl, silence after which an engine is forgotten (ms), at most,
--   payload for what is deserted, pause between sweeps beyond which nobody could attend (ms).
-- Replies {looked at, ended at their time, ended for being deserted}.
local now, live_ttl, overdue, deserted = now_ms(), num(ARGV[3]), 0, 0
local due = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', now, 'LIMIT', 0, ARGV[5])
for _, rid in ipairs(due) do
  local r = load(rid)
  if not r or r.st == 'ended' then
    redis.call('ZREM', DEADLINES, rid)
  elseif now >= last_moment(r, live_ttl) then
    stop_request(r, ARGV[1], ARGV[2])
    overdue = overdue + 1
  else
    redis.call('ZADD', DEADLINES, last_moment(r, live_ttl), rid)
  end
end
-- Since when there were sweeps without a pause: nobody is deserted before a grace from then.
local since = num(redis.call('GET', PREFIX .. 'swept'))
if since == 0 then since = now end
redis.call('SET', PREFIX .. 'swept', since, 'PX', ARGV[7])
local left = redis.call('ZRANGEBYSCORE', DESERTED, '-inf', now, 'LIMIT', 0, ARGV[5])
for _, sid in ipairs(left) do
  local earliest = since + num(redis.call('HGET', submission_key(sid), 'gr'))
  if earliest > now then
    redis.call('ZADD', DESERTED, earliest, sid)
  else
    deserted = deserted + stop_submission(sid, ARGV[6], ARGV[2])
    redis.call('ZREM', DESERTED, sid)
  end
end
local gone = redis.call('ZRANGEBYSCORE', GONE, '-inf', now, 'LIMIT', 0, ARGV[5])
for _, member in ipairs(gone) do
  local bytes, tenant = string.match(member, '^(%d+) (%S+) ')
  if bytes then count_bytes(tenant, -bytes) end
  redis.call('ZREM', GONE, member)
end
local engines = redis.call('HGETALL', PREFIX .. 'engines')
for i = 1, #engines, 2 do
  if now - num(string.match(engines[i + 1], '^%d+')) > num(ARGV[4]) then
    local pending = 0
    for priority = 0, 2 do -- deleting a consumer would lose what is pending under its name
      local queue = queue_key(priority)
      local count = #grouped(priority, 'XPENDING', queue, GROUP, '-', '+', 1, engines[i])
      if count == 0 then redis.call('XGROUP', 'DELCONSUMER', queue, GROUP, engines[i]) end
      pending = pending + count
    end
    if pending == 0 then redis.call('HDEL', PREFIX .. 'engines', engines[i]) end
  end
end
return { math.max(#due, #left, #gone), overdue, deserted }
