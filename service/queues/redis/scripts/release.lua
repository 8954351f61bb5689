#!lua flags=allow-oom
-- Releases requests: another engine continues them. If the engine `died`, its death is counted.
-- args: items (leases: {request, epoch, owner}), died, lease, max_attempts, window, keep_blame.
-- Returns {released, failed for their crashes}.
local released, crashed, woken = 0, 0, {}
for _, lease in ipairs(args.items) do
  local r = leased(lease)
  if r and args.died and count_death(r) then
    stop_request(r, CRASH_LOOP)
    crashed = crashed + 1
  elseif r then
    release(r, engine_of(r))
    released = released + 1
    local class = r.n > 0 and r.cls or ''
    if not woken[r.ft .. class] then wake(r.ft, class, 'r') end
    woken[r.ft .. class] = true
  end
end
return { released, crashed }
