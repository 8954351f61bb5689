#!lua flags=allow-oom
-- Counts one call against a key's requests per minute, or nothing if they are used up.
-- args: key, limit. Returns {ms to wait, ms used}, as text.
local meter = meter_key(args.key, 'requests')
local wait = wait_ms(meter, args.limit, 1)
if wait <= 0 then use(meter, args.limit, 1) end
return { fraction(wait), fraction(used_ms(meter)) }
