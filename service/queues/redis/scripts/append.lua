#!lua
-- Journals tokens, where they continue what is there. Not allowed when memory is full.
-- ARGV: request, epoch, owner, start, count, payload. Replies {status, tokens in the journal}.
local request = request_key(ARGV[1])
local v = redis.call('HMGET', request, 'st', 'ep', 'own', 'n', 'iso', 'dp')
local n, start = num(v[4]), num(ARGV[4])
local stop = start + ARGV[5]
if v[2] ~= ARGV[2] or v[3] ~= ARGV[3] then return { 'fenced', n } end
if n >= stop then return { 'dup', n } end
if v[1] ~= 'running' then return { 'fenced', n } end
if n ~= start then return { 'gap', n } end
local journal, id = journal_key(ARGV[1]), stop .. '-0'
redis.call('XADD', journal, id, 'k', ARGV[6])
redis.call('HSET', request, 'n', stop)
redis.call('PUBLISH', journal, id)
if v[5] == '1' then -- isolated, because engines died at the position v[6]
  local past = stop - num(v[6])
  if past > MARGIN then
    local r = { rid = ARGV[1], iso = true }
    leave_lane(r)
    set_blame(r, {})
  elseif past > PASSED and start - num(v[6]) <= PASSED then
    redis.call('PUBLISH', WORK, 'lane')
  end
end
return { 'ok', stop }
