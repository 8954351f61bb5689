#!lua flags=allow-oom
-- The engine's own terminal record. args: request, epoch, owner, count, window. ARGV[2]: the record.
-- Returns {status, tokens in the journal}.
local r = load(args.request)
if not r then return { 'fenced', 0 } end
if r.ep ~= args.epoch or r.own ~= args.owner then return { 'fenced', r.n } end
if r.st == 'ended' then
  local same = redis.call('HGET', request_key(r.rid), 'fin') == ARGV[2]
  return { same and 'dup' or 'fenced', r.n }
end
if r.st ~= 'running' then return { 'fenced', r.n } end
if r.n ~= args.count then return { 'gap', r.n } end
end_request(r, ARGV[2])
return { 'ok', r.n }
