-- The lane maps isolated requests to the engine that runs them; see contract.py for the rules.
local LANE, SUSPECTS = PREFIX .. 'lane', PREFIX .. 'suspects'
local function isolates_key(engine) return PREFIX .. 'isolates:' .. engine end

-- `names`: the engines whose deaths count against the request.
local function set_blame(r, names)
  r.by, r.att = table.concat(names, ' '), #names
  redis.call('HSET', request_key(r.rid), 'by', r.by, 'att', r.att)
end

-- Wakes an engine that may isolate the next suspect.
local function wake_for_suspect()
  local rid = redis.call('ZRANGE', SUSPECTS, 0, 0)[1]
  if not rid then return end
  local v = redis.call('HMGET', request_key(rid), 'ft', 'n', 'cls')
  wake(v[1] or '', num(v[2]) > 0 and v[3] or '', 'w')
end

-- What an engine isolates stays on record while it may be dead: its other requests are bystanders.
local function forget_isolation(engine)
  for _, other in ipairs(redis.call('HVALS', LANE)) do
    if other == engine then return end
  end
  redis.call('DEL', isolates_key(engine))
end

local function leave_lane(r, died)
  if not r.iso then return end
  r.iso = false
  local engine = redis.call('HGET', LANE, r.rid)
  redis.call('HDEL', LANE, r.rid)
  redis.call('HDEL', request_key(r.rid), 'iso')
  if redis.call('EXISTS', LANE) == 0 then wake_for_suspect() end
  if engine and not died then forget_isolation(engine) end
end
