#!lua flags=allow-oom
-- Counts one call against the requests a minute of a key, or nothing if they are used up.
-- ARGV: key, requests a minute. Replies {ms to wait, ms used}, as text.
local meter, limit = meter_key(ARGV[1], 'requests'), num(ARGV[2])
local wait = wait_ms(meter, limit, 1)
if wait <= 0 then use(meter, limit, 1) end
return { fraction(wait), fraction(used_ms(meter)) }
