#!lua flags=allow-oom
-- Cancels what has not ended of a submission, and removes it from lookup. Its journals stay for
-- `window`, for their present readers.
-- args: submission, window. Returns how many requests were cancelled.
local cancelled = cancel_submission(args.submission)
expire_submission(args.submission)
redis.call('DEL', submission_key(args.submission))
return cancelled
