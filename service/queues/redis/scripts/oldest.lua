#!lua flags=no-writes,allow-oom
-- Returns the age of the oldest queued request in ms, or '' if there is none.
local first = redis.call('ZRANGE', SINCE, 0, 0, 'WITHSCORES')
return first[1] and math.max(0, now_ms() - first[2]) or ''
