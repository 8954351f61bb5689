#!lua
-- Journals the tokens of an engine step; each record continues what is there. Not allowed when memory is
-- full. args: items (of {request, epoch, owner, start, count}). ARGV[1 + i]: record i.
-- Returns {i, status, tokens in the journal} for each record that was not written.
local function append(item, record)
  local rid, epoch, owner, start, count = unpack(item)
  local request, stop = request_key(rid), start + count
  local v = redis.pcall('HMGET', request, 'st', 'ep', 'own', 'n', 'rd', 'iso')
  if v.err then return 'fenced', 0 end
  local n = num(v[4])
  if num(v[2]) ~= epoch or v[3] ~= owner then return 'fenced', n end
  if n >= stop then return 'dup', n end
  if v[1] ~= 'running' then return 'fenced', n end
  if n ~= start then return 'gap', n end
  local id = stop .. '-0'
  if type(redis.pcall('XADD', journal_key(rid), id, 'k', record)) == 'table' then return 'fenced', n end
  redis.call('HSET', request, 'n', stop)
  if v[5] then collect(v[5], rid, id, 'k', record) end
  if v[6] ~= '1' then return end
  local died_at = num(redis.call('HGET', request, 'dp')) -- isolated, because engines died there
  local past = stop - died_at
  if past > CLEARED_AFTER then
    local r = { rid = rid, iso = true }
    leave_lane(r)
    set_blame(r, {})
  elseif past > PASSED_AFTER and start - died_at <= PASSED_AFTER then
    wake_for_suspect()
  end
end

local refused = {}
for i, item in ipairs(args.items) do
  local status, n = append(item, ARGV[1 + i])
  if status then refused[#refused + 1] = { i, status, n } end
end
send_collected()
return refused
