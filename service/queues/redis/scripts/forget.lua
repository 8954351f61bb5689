#!lua flags=allow-oom
-- Cancels what has not ended of a submission, and removes it from lookup. Its journals stay for
-- `linger`, for their present readers.
-- args: submission, linger, window. Returns {requests cancelled}.
local cancelled = cancel_submission(args.submission)
expire_submission(args.submission, args.linger)
redis.call('DEL', submission_key(args.submission))
return { cancelled }
