#!lua flags=allow-oom
-- Starts the time for which ended submissions are kept again. args: items (submissions), window.
for _, sid in ipairs(args.items) do
  local keep, left = unpack(redis.call('HMGET', submission_key(sid), 'keep', 'left'))
  if keep and num(left) <= 0 then keep_submission(sid) end
end
return 0
