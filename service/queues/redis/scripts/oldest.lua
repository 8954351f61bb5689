#!lua flags=no-writes,allow-oom
-- Replies for how many milliseconds the first of the waiting requests waits, or '' where nobody does.
local first = redis.call('ZRANGE', SINCE, 0, 0, 'WITHSCORES')
return first[1] and math.max(0, now_ms() - first[2]) or ''
