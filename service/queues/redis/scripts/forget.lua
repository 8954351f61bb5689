#!lua flags=allow-oom
-- Cancels what has not ended of a submission, and then it cannot be looked up any more. Its journal
-- stays a moment longer, for those who are reading it.
-- ARGV: submission, payload, how long the journal stays (ms).
-- Replies how many requests were ended.
local sub = submission_key(ARGV[1])
local stopped = stop_submission(ARGV[1], ARGV[2], ARGV[3])
for i = 0, num(redis.call('HGET', sub, 'num')) - 1 do
  redis.call('PEXPIRE', request_key(ARGV[1] .. '.' .. i), ARGV[3])
  redis.call('PEXPIRE', journal_key(ARGV[1] .. '.' .. i), ARGV[3])
end
fade(ARGV[1], ARGV[3])
redis.call('DEL', sub)
redis.call('ZREM', DESERTED, ARGV[1])
return stopped
