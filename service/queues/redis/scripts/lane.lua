-- The lane maps isolated requests to the engine that runs them; see contract.py for the rules.
local LANE = PREFIX .. 'lane'
local function isolates_key(engine) return PREFIX .. 'isolates:' .. engine end

-- `names`: the engines whose deaths count against the request.
local function set_blame(r, names)
  r.by, r.att = table.concat(names, ' '), #names
  redis.call('HSET', request_key(r.rid), 'by', r.by, 'att', r.att)
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
  if redis.call('EXISTS', LANE) == 0 then redis.call('SPUBLISH', WORK, 'lane') end
  if engine and not died then forget_isolation(engine) end
end
