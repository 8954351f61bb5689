#!lua
-- Journals the tokens of an engine step; each record continues what is there. Not allowed when memory is
-- full. This script runs most, so nothing is computed in it that can be sent: numbers are text, as Redis
-- stores them. args: items (of {request, epoch, owner, tokens before it, tokens with it}).
-- ARGV[2 * i], ARGV[1 + 2 * i]: the head of record i in a message (see mail.lua), and the record.
-- Returns {i, status, tokens in the journal} for each record that was not written.
local function refuse(v, item)
  if v.err then return 'fenced', 0 end
  local n, stop = num(v[4]), num(item[5])
  if v[2] ~= item[2] or v[3] ~= item[3] then return 'fenced', n end
  if n >= stop then return 'dup', n end
  return v[1] == 'running' and 'gap' or 'fenced', n
end

-- A record of a request that is isolated, because engines died at the position `dp`.
local function pass_death(rid, start, stop)
  local died_at = num(redis.call('HGET', request_key(rid), 'dp'))
  if stop - died_at > CLEARED_AFTER then
    leave_lane({ rid = rid, iso = true })
    set_blame({ rid = rid }, {})
  elseif stop - died_at > PASSED_AFTER and start - died_at <= PASSED_AFTER then
    wake_for_suspect()
  end
end

local function append(item, head, record)
  local rid, stop = item[1], item[5]
  local request = request_key(rid)
  local v = redis.pcall('HMGET', request, 'st', 'ep', 'own', 'n', 'rd', 'iso')
  if v.err or v[4] ~= item[4] or v[3] ~= item[3] or v[2] ~= item[2] or v[1] ~= 'running' then
    return refuse(v, item)
  end
  local added = redis.pcall('XADD', journal_key(rid), stop .. '-0', 'k', record)
  if added.err then return 'fenced', num(v[4]) end
  redis.call('HSET', request, 'n', stop)
  if v[5] then collect(v[5], head, record) end
  if v[6] == '1' then pass_death(rid, num(item[4]), num(stop)) end
end

local refused = {}
for i, item in ipairs(args.items) do
  local status, n = append(item, ARGV[2 * i], ARGV[1 + 2 * i])
  if status then refused[#refused + 1] = { i, status, n } end
end
send_collected()
return refused
