#!lua flags=allow-oom
-- From now on a mailbox gets what is added to a journal. args: request, mailbox, max_readers.
-- Returns {state, tokens in the journal, mailboxes} as HMGET does.
local request = request_key(args.request)
local v = redis.call('HMGET', request, 'st', 'n', 'rd')
if v[1] and v[1] ~= 'ended' then
  local readers, num_readers = args.mailbox, 1
  for mailbox in string.gmatch(v[3] or '', '%S+') do
    if mailbox == args.mailbox then return v end
    num_readers = num_readers + 1
    if num_readers <= args.max_readers then readers = readers .. ' ' .. mailbox end
  end
  redis.call('HSET', request, 'rd', readers)
  v[3] = readers
end
return v
