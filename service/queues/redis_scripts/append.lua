#!lua
-- Journals tokens, where they continue what is there. Not allowed when memory is full.
-- ARGV: request, epoch, owner, start, count, payload. Replies {status, tokens in the journal}.
local request = request_key(ARGV[1])
local v = redis.call('HMGET', request, 'st', 'ep', 'own', 'n')
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
return { 'ok', stop }
