-- Rate meters: see `Meter` in admission.py. The value is the time at which the meter is back to zero;
-- the key expires then.
local MINUTE = 60000
local function meter_key(key, unit) return PREFIX .. 'k:' .. key .. ':' .. unit end
local function fraction(ms) return string.format('%.3f', ms) end -- Redis truncates numbers in replies
local function used_ms(meter) return math.max(0, num(redis.call('GET', meter)) - now_ms()) end
-- How long an amount has to wait; 0: not at all. The tolerance is for rounding errors.
local function wait_ms(meter, limit, amount)
  if not limit then return 0 end
  local over = used_ms(meter) + amount * MINUTE / limit - MINUTE
  return over > 0.001 and over or 0
end
local function use(meter, limit, amount)
  if not limit then return end
  local now, used = now_ms(), used_ms(meter) + amount * MINUTE / limit
  if used <= 0 then redis.call('DEL', meter)
  else redis.call('SET', meter, fraction(now + used), 'PX', math.ceil(used)) end
end
