#!lua flags=allow-oom
-- Lends parts of this shard's limits to another shard, or takes back what others give: see shares.py.
-- args: nonce, window, tenant (whose kept submissions make room; absent: none do); limits of {name,
--   stored (boolean: a field of STORED), field, most, amount}; meters of {key, limit, amount}. A
--   positive amount is lent if it is free, a negative one is got back.
-- Returns the amounts that were lent, as text.
local transfer = PREFIX .. 'loan:' .. args.nonce
local done = redis.call('GET', transfer)
if done then return cjson.decode(done) end
local moved = {}
for _, limit in ipairs(args.limits) do
  local function free()
    return limit.most - lent(limit.name)
      - num(redis.call('HGET', limit.stored and STORED or ADMISSION, limit.field))
  end
  local amount = limit.amount
  if amount > 0 then
    if args.tenant and limit.stored then
      make_room(function() return free() >= amount end, limit.field ~= 'all' and args.tenant or nil)
    end
    amount = math.max(0, math.min(amount, free()))
  end
  if redis.call('HINCRBY', LENT, limit.name, amount) == 0 then redis.call('HDEL', LENT, limit.name) end
  moved[#moved + 1] = string.format('%.0f', amount)
end
for _, meter in ipairs(args.meters) do
  local key, amount = meter_key(meter.key, 'tokens'), meter.amount
  if amount > 0 then
    amount = math.max(0, math.min(amount, (MINUTE - used_ms(key)) * meter.limit / MINUTE))
  end
  use(key, meter.limit, amount)
  moved[#moved + 1] = fraction(amount)
end
redis.call('SET', transfer, cjson.encode(moved), 'PX', 60000)
return moved
