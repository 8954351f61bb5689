-- Which engines hold the prefixes of queued requests; see contract.py for the rules.
local RESERVED = PREFIX .. 'reserved'
local function holders_key(prefix) return PREFIX .. 'h:' .. prefix end

-- Returns the reports of the engines that hold a prefix and are listed.
local function holders_of(prefix)
  local reports = {}
  for _, engine in ipairs(redis.call('HKEYS', holders_key(prefix))) do
    local seen, report = string.match(redis.call('HGET', PREFIX .. 'engines', engine) or '', '^(%d+) (.*)$')
    if seen and now_ms() - seen < ENGINE_SILENCE then reports[#reports + 1] = report end
  end
  return reports
end

-- Reserves a queued request for the holders of its longest prefix that is held, and returns these.
-- `prefixes` has the longest first.
local function reserve(rid, prefixes, now)
  if #prefixes == 0 or redis.call('HLEN', PREFIX .. 'engines') < 2 then return end
  local keys = {}
  for i, prefix in ipairs(prefixes) do keys[i] = holders_key(prefix) end
  if redis.call('EXISTS', unpack(keys)) == 0 then return end
  for _, prefix in ipairs(prefixes) do
    local count = redis.call('HLEN', holders_key(prefix))
    if count > MAX_HOLDERS then return end
    if count > 0 and #holders_of(prefix) > 0 then
      redis.call('HSET', RESERVED, rid, now + RESERVED_FOR .. ' ' .. prefix)
      return redis.call('HKEYS', holders_key(prefix))
    end
  end
end

-- The ms for which a queued request is left to others, or nil if the engine may take it.
local function left_for(rid, engine, running)
  local till, prefix = string.match(redis.call('HGET', RESERVED, rid) or '', '^(%d+) (.*)$')
  local left = num(till) - now_ms()
  if left <= 0 or redis.call('HEXISTS', holders_key(prefix), engine) == 1 then return nil end
  for _, report in ipairs(holders_of(prefix)) do
    if num(string.match(report, '"running": ?(%d+)')) <= 2 * running + OVERLOADED then return left end
  end
  return nil
end
