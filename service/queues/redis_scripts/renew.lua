#!lua flags=allow-oom
-- Extends leases. ARGV: lease ms, then for each: request, epoch, owner. Replies the lost requests.
local until_ms, lost = now_ms() + ARGV[1], {}
for i = 2, #ARGV, 3 do
  local r = load(ARGV[i])
  if r and r.st == 'running' and r.ep == ARGV[i + 1] and r.own == ARGV[i + 2] then
    redis.call('HSET', request_key(r.rid), 'ld', until_ms)
    set_idle(r, string.match(r.own, '^(.*):'), 0)
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
