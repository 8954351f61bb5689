#!lua flags=allow-oom
-- Extends the leases of one engine; a heartbeat, too.
-- args: items (leases: {request, epoch, owner}), lease. Returns the requests that are no longer its own.
local lease_end, lost = now_ms() + args.lease, {}
note_alive(engine_of({ own = args.items[1].owner }))
for _, lease in ipairs(args.items) do
  local r = leased(lease)
  if r then
    redis.call('HSET', request_key(r.rid), 'ld', lease_end)
    set_idle(r, engine_of(r), 0)
  else
    lost[#lost + 1] = lease.request
  end
end
return lost
