#!lua flags=allow-oom
-- The engine's own terminal records. args: items (of {request, epoch, owner, count}), window.
-- ARGV[1 + i]: record i. Returns {i, status, tokens in the journal} for each that was not written.
local function finish(item, record)
  local rid, epoch, owner, count = unpack(item)
  local r = load(rid)
  if not r then return 'fenced', 0 end
  if r.ep ~= epoch or r.own ~= owner then return 'fenced', r.n end
  if r.st == 'ended' then
    return redis.call('HGET', request_key(rid), 'fin') == record and 'dup' or 'fenced', r.n
  end
  if r.st ~= 'running' then return 'fenced', r.n end
  if r.n ~= count then return 'gap', r.n end
  end_request(r, record)
end

local refused = {}
for i, item in ipairs(args.items) do
  local status, n = finish(item, ARGV[1 + i])
  if status then refused[#refused + 1] = { i, status, n } end
end
return refused
