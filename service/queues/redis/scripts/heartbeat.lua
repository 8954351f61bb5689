#!lua flags=allow-oom
-- Puts off the time at which submissions count as deserted. ARGV: submissions.
-- Replies how many were put off.
local now, attended = now_ms(), 0
for _, sid in ipairs(ARGV) do
  if redis.call('ZSCORE', DESERTED, sid) then
    local grace = num(redis.call('HGET', submission_key(sid), 'gr'))
    redis.call('ZADD', DESERTED, now + grace, sid)
    attended = attended + 1
  end
end
return attended
