#!lua flags=allow-oom
-- Postpones the time at which submissions count as abandoned. args: items (submissions).
-- Returns how many were postponed.
local now, postponed = now_ms(), 0
for _, sid in ipairs(args.items) do
  if redis.call('ZSCORE', ABANDONED, sid) then
    local grace = num(redis.call('HGET', submission_key(sid), 'gr'))
    redis.call('ZADD', ABANDONED, now + grace, sid)
    postponed = postponed + 1
  end
end
return postponed
