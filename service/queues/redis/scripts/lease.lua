#!lua flags=allow-oom
-- Takes, extends or drops a named lease. args: name, owner, ms (0: drop it). Returns {1} if the owner
-- has it now.
local lease = PREFIX .. 'lease:' .. args.name
local owner = redis.call('GET', lease)
if owner and owner ~= args.owner then return { 0 } end
if args.ms == 0 then
  redis.call('DEL', lease)
  return { 0 }
end
redis.call('SET', lease, args.owner, 'PX', args.ms)
return { 1 }
