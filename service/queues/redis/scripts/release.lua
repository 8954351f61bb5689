#!lua flags=allow-oom
-- Gives requests back: another engine goes on with them. ARGV: lease, died (0 1), max attempts, record
--   of a crash loop, resume window, how long blame is kept (times in ms), then for each: request, epoch,
--   owner. `died`: the engine is broken, and that counts as its death.
-- Replies {released, ended for their crashes}.
local lease, died, released, crashed = num(ARGV[1]), ARGV[2] == '1', 0, 0
for i = 7, #ARGV, 3 do
  local r = load(ARGV[i])
  if r and r.st == 'running' and r.ep == ARGV[i + 1] and r.own == ARGV[i + 2] then
    if died and count_death(r, num(ARGV[3]), ARGV[6]) then
      stop_request(r, ARGV[4], ARGV[5])
      crashed = crashed + 1
    else
      leave_to_others(r, engine_of(r), lease)
      released = released + 1
    end
  end
end
if released > 0 then redis.call('PUBLISH', WORK, 'released') end
return { released, crashed }
