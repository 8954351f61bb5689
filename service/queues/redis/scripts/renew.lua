#!lua flags=allow-oom
-- Extends the leases of one engine: a sign of life, too.
-- ARGV: lease ms, then for each: request, epoch, owner. Replies the lost requests.
local until_ms, lost = now_ms() + ARGV[1], {}
local engine = #ARGV > 1 and engine_of({ own = ARGV[4] }) or ''
if note_alive(engine) then take_blame_back(engine, num(ARGV[1])) end
for i = 2, #ARGV, 3 do
  local r = load(ARGV[i])
  if r and r.st == 'running' and r.ep == ARGV[i + 1] and r.own == ARGV[i + 2] then
    redis.call('HSET', request_key(r.rid), 'ld', until_ms)
    set_idle(r, engine_of(r), 0)
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
