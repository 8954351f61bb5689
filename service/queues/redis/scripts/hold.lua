#!lua
-- Notes what an engine holds. Not allowed when memory is full.
-- args: engine, added and removed (names of prefixes), ttl.
for _, prefix in ipairs(args.removed) do redis.call('HDEL', holders_key(prefix), args.engine) end
for _, prefix in ipairs(args.added) do
  redis.call('HSET', holders_key(prefix), args.engine, 1)
  redis.call('PEXPIRE', holders_key(prefix), args.ttl)
end
