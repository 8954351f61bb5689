#!lua
-- Journals tokens that continue what is there. Not allowed when memory is full.
-- args: request, epoch, owner, start, count. ARGV[2]: the record.
-- Returns {status, tokens in the journal}.
local request = request_key(args.request)
local v = redis.call('HMGET', request, 'st', 'ep', 'own', 'n', 'iso', 'dp')
local n, start = num(v[4]), args.start
local stop = start + args.count
if num(v[2]) ~= args.epoch or v[3] ~= args.owner then return { 'fenced', n } end
if n >= stop then return { 'dup', n } end
if v[1] ~= 'running' then return { 'fenced', n } end
if n ~= start then return { 'gap', n } end
local journal, id = journal_key(args.request), stop .. '-0'
redis.call('XADD', journal, id, 'k', ARGV[2])
redis.call('HSET', request, 'n', stop)
redis.call('PUBLISH', journal, id)
if v[5] == '1' then -- isolated, because engines died at the position v[6]
  local past = stop - num(v[6])
  if past > CLEARED_AFTER then
    local r = { rid = args.request, iso = true }
    leave_lane(r)
    set_blame(r, {})
  elseif past > PASSED_AFTER and start - num(v[6]) <= PASSED_AFTER then
    redis.call('PUBLISH', WORK, 'lane')
  end
end
return { 'ok', stop }
