#!lua flags=allow-oom
-- Ends what is overdue or abandoned, subtracts the bytes of what is gone, and forgets engines that are
-- long gone.
-- args: batch, forget_engine, sweep_pause, window, live_ttl.
-- Returns {looked at, overdue, abandoned}.
local now, overdue, abandoned = now_ms(), 0, 0
local function due(key) return redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, args.batch) end

local late = due(DEADLINES)
for _, rid in ipairs(late) do
  local r = load(rid)
  if not r or r.st == 'ended' then
    redis.call('ZREM', DEADLINES, rid)
  elseif now >= expires(r) then
    stop_request(r, DEADLINE)
    overdue = overdue + 1
  else
    redis.call('ZADD', DEADLINES, expires(r), rid)
  end
end

-- Since when sweeps came without a pause: no grace period ends before it has passed since then.
local since = num(redis.call('GET', PREFIX .. 'swept'))
if since == 0 then since = now end
redis.call('SET', PREFIX .. 'swept', since, 'PX', args.sweep_pause)
local left = due(ABANDONED)
for _, sid in ipairs(left) do
  local earliest = since + num(redis.call('HGET', submission_key(sid), 'gr'))
  if earliest > now then
    redis.call('ZADD', ABANDONED, earliest, sid)
  else
    abandoned = abandoned + cancel_submission(sid)
    redis.call('ZREM', ABANDONED, sid)
  end
end

local gone = due(GONE)
for _, member in ipairs(gone) do
  local bytes, tenant = string.match(member, '^(%d+) (%S+) ')
  if bytes then
    count_bytes(tenant, -bytes)
    unkeep(member, tenant, bytes)
  end
  redis.call('ZREM', GONE, member)
end

local engines = redis.call('HGETALL', PREFIX .. 'engines')
for i = 1, #engines, 2 do
  if now - num(string.match(engines[i + 1], '^%d+')) > args.forget_engine then
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
return { math.max(#late, #left, #gone), overdue, abandoned }
