#!lua flags=allow-oom
-- Ends requests that have not ended.
-- ARGV: only those over their time (0 1), payload, resume window, live ttl (ms), requests...
-- Replies how many were ended.
local now, stopped = now_ms(), 0
for i = 5, #ARGV do
  local r = load(ARGV[i])
  if r and r.st ~= 'ended' and (ARGV[1] == '0' or now >= last_moment(r, num(ARGV[4]))) then
    stop_request(r, ARGV[2], ARGV[3])
    stopped = stopped + 1
  end
end
return stopped
