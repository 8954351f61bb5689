#!lua flags=allow-oom
-- The engine's own terminal record.
-- ARGV: request, epoch, owner, tokens in all, payload, resume window ms.
-- Replies {status, tokens in the journal}.
local r = load(ARGV[1])
if not r then return { 'fenced', 0 } end
if r.ep ~= ARGV[2] or r.own ~= ARGV[3] then return { 'fenced', r.n } end
if r.st == 'ended' then
  local same = redis.call('HGET', request_key(r.rid), 'fin') == ARGV[5]
  return { same and 'dup' or 'fenced', r.n }
end
if r.st ~= 'running' then return { 'fenced', r.n } end
if r.n ~= num(ARGV[4]) then return { 'gap', r.n } end
end_request(r, ARGV[5], ARGV[6])
return { 'ok', r.n }
