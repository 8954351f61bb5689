#!lua flags=allow-oom
-- Extends the leases of one engine; a heartbeat, too.
-- args: items (leases: {request, epoch, owner}), lease. Returns the requests that are no longer its own.
local lease_end, lost = string.format('%.0f', now_ms() + args.lease), {}
local engine = engine_of({ own = args.items[1].owner })
note_alive(engine)
for _, lease in ipairs(args.items) do
  local v = redis.pcall('HMGET', request_key(lease.request), 'st', 'ep', 'own', 'pr', 'eid')
  if not v.err and v[1] == 'running' and num(v[2]) == lease.epoch and v[3] == lease.owner then
    redis.call('HSET', request_key(lease.request), 'ld', lease_end)
    set_idle({ pr = v[4], eid = v[5] }, engine, 0)
  else
    lost[#lost + 1] = lease.request
  end
end
return lost
