#!lua flags=allow-oom
-- Gives requests back without blame. ARGV: lease ms, then for each: request, epoch, owner.
-- Replies how many.
local released = 0
for i = 2, #ARGV, 3 do
  local r = load(ARGV[i])
  if r and r.st == 'running' and r.ep == ARGV[i + 1] and r.own == ARGV[i + 2] then
    redis.call('HSET', request_key(r.rid), 'own', '', 'ld', now_ms())
    set_idle(r, string.match(r.own, '^(.*):'), ARGV[1] + 1)
    released = released + 1
  end
end
if released > 0 then redis.call('PUBLISH', WORK, 'released') end
return released
