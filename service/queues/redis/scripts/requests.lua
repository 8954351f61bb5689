-- Requests and submissions: their state, their place in the queues and their ends.
-- Reads args.live_ttl and args.window.
local DEADLINES, SINCE = PREFIX .. 'dl', PREFIX .. 'since'
local LINES = PREFIX .. 'lines'
local MODELS = PREFIX .. 'models' -- '<field> <model>' -> queued requests, their tokens, running ones
local GROUP = 'engines'

local function queue_key(priority) return PREFIX .. 'q' .. priority end
local function turns_key(priority, line)
  return PREFIX .. 'w' .. priority .. (line == '' and '' or ':' .. line)
end

-- The request as a table, or nil if there is none (or something else under its name).
local function load(rid)
  local v = redis.pcall('HMGET', request_key(rid), 'st', 'ep', 'own', 'n', 'ld', 'att', 'cls', 'dl',
    'ct', 'ten', 'cost', 'eid', 'pr', 'sub', 'by', 'dp', 'iso', 'ft', 'rd')
  if v.err or not v[1] or not v[14] then return nil end
  return { rid = rid, st = v[1], ep = num(v[2]), own = v[3], n = num(v[4]), ld = num(v[5]),
    att = num(v[6]), cls = v[7], dl = num(v[8]), ct = num(v[9]), ten = v[10], cost = num(v[11]),
    eid = v[12], pr = v[13], sub = v[14], by = v[15] or '', dp = tonumber(v[16] or -1),
    iso = v[17] == '1', ft = v[18] or '', rd = v[19] or '' }
end

local function engine_of(r) return string.match(r.own, '^(.*):') or '' end

-- The request of a lease, or nil if it is not running under that lease any more.
local function leased(lease)
  local r = load(lease.request)
  return r and r.st == 'running' and r.ep == lease.epoch and r.own == lease.owner and r or nil
end

-- A command of the consumer group. Creates the group if it is missing, from the stream's beginning:
-- an entry that is delivered a second time is recognised by the state of its request.
local function grouped(priority, ...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err and string.find(reply.err, 'NOGROUP', 1, true) then
    redis.call('XGROUP', 'CREATE', queue_key(priority), GROUP, '0', 'MKSTREAM')
    reply = redis.call(...)
  end
  return reply
end

-- Sets how long an entry has been idle, so that XAUTOCLAIM finds it when the lease is over.
local function set_idle(r, consumer, idle)
  grouped(r.pr, 'XCLAIM', queue_key(r.pr), GROUP, consumer, 0, r.eid, 'IDLE', idle, 'JUSTID')
end

-- The time at which a request expires: its deadline or, without one, `live_ttl` after an engine held
-- it for the last time.
local function expires(r)
  if r.dl > 0 then return r.dl end
  return (r.st == 'queued' and r.ct or r.ld) + args.live_ttl
end

local function count_down(field, by)
  local left = redis.call('HINCRBY', ADMISSION, field, -by)
  if left == 0 then redis.call('HDEL', ADMISSION, field) end
  return left
end

-- Counts requests ('q', 'run') or tokens ('tok'): of all and, by the features, of their model. Older
-- versions count only the former, so the latter start again whenever there is nothing at all.
local function count(field, features, by)
  local name = field .. ' ' .. (string.match(features, 'model:(%S+)') or '')
  if redis.call('HINCRBY', MODELS, name, by) <= 0 then redis.call('HDEL', MODELS, name) end
  if redis.call('HINCRBY', ADMISSION, field, by) > 0 then return end
  redis.call('HDEL', ADMISSION, field)
  for _, other in ipairs(redis.call('HKEYS', MODELS)) do
    if string.match(other, '^%S+') == field then redis.call('HDEL', MODELS, other) end
  end
end

-- A line holds the queued requests of one priority that need the same features of an engine.
local function leave_line(r)
  redis.call('ZREM', turns_key(r.pr, r.ft), r.eid)
  redis.call('HDEL', RESERVED, string.match(r.eid, ' (.*)$') or r.eid)
  if r.ft == '' then return end
  for priority = 0, 2 do
    if redis.call('EXISTS', turns_key(priority, r.ft)) == 1 then return end
  end
  redis.call('SREM', LINES, r.ft)
end

local function leave_queue(r)
  redis.call('ZREM', SINCE, r.rid)
  count('q', r.ft, -1)
  count('tok', r.ft, -r.cost)
end

local function leave_stream(priority, eid)
  redis.call('XACK', queue_key(priority), GROUP, eid)
  redis.call('XDEL', queue_key(priority), eid)
end

-- Counts an ended request down for its key, and the tokens beyond those that admission counted.
local function settle(r)
  local v = redis.call('HMGET', request_key(r.rid), 'key', 'tpm', 'share')
  if not v[1] then return end
  count_down('k:' .. v[1], 1)
  local limit = num(v[2])
  use(meter_key(v[1], 'tokens'), limit > 0 and limit or nil, r.n - num(v[3]))
end

-- Counts what an ended request has used: see usage.py. Requests of older versions have no account.
local function count_usage(r, record)
  local account = redis.call('HGET', submission_key(r.sub), 'acc')
  if r.st == 'queued' or not account then return end
  local day = PREFIX .. 'usage:' .. math.floor(now_ms() / 86400000)
  local v = redis.call('HMGET', request_key(r.rid), 'pt', 'enc')
  local prompt, generated = num(v[1]), v[2] == '1' and 0 or r.n
  local cached = prompt > 0 and num(cjson.decode(record).c) or 0
  for kind, amount in pairs({ n = 1, p = prompt, c = cached, g = generated }) do
    if amount > 0 then redis.call('HINCRBY', day, kind .. ' ' .. account, amount) end
  end
  redis.call('EXPIRE', day, USAGE_KEPT)
end

-- Writes the one terminal record. `eid` is a queued request's member in its line, and a running one's
-- entry in the stream.
local function end_request(r, record)
  if r.st == 'queued' then
    leave_line(r)
    leave_queue(r)
  else
    count('run', r.ft, -1)
    count_down('r:' .. r.ten, 1)
    leave_stream(r.pr, r.eid)
  end
  if count_down('t:' .. r.ten, 1) == 0 then
    redis.call('HDEL', ADMISSION, 'f:' .. r.ten)
    if count_down('tens', 1) == 0 then redis.call('HDEL', ADMISSION, 'now') end
  end
  if r.att > 0 or r.iso then
    redis.call('ZREM', SUSPECTS, r.rid)
    leave_lane(r)
  end
  settle(r)
  count_usage(r, record)
  count_bytes(r.ten, -num(redis.call('HGET', request_key(r.rid), 'sz')))
  redis.call('XADD', journal_key(r.rid), r.n .. '-1', 'e', record)
  redis.call('HSET', request_key(r.rid), 'st', 'ended', 'fin', record)
  redis.call('HDEL', request_key(r.rid), 'body')
  redis.call('ZREM', DEADLINES, r.rid)
  collect(r.rd, string.format('%s %d-1 e %d\n', r.rid, r.n, #record), record)
  send_collected()
  if redis.call('HINCRBY', submission_key(r.sub), 'left', -1) <= 0 then keep_submission(r.sub) end
end

-- Ends a request without its engine, which the new epoch fences off.
local function stop_request(r, record)
  redis.call('HINCRBY', request_key(r.rid), 'ep', 1)
  redis.call('HSET', request_key(r.rid), 'own', '')
  if r.st == 'running' and r.own ~= '' then post(engine_of(r), 's' .. r.rid) end
  end_request(r, record)
end

-- Cancels what has not ended of a submission. Returns how many requests.
local function cancel_submission(sid)
  local cancelled = 0
  for i = 0, num(redis.call('HGET', submission_key(sid), 'num')) - 1 do
    local r = load(sid .. '.' .. i)
    if r and r.st ~= 'ended' then
      stop_request(r, CANCELLED)
      cancelled = cancelled + 1
    end
  end
  return cancelled
end
