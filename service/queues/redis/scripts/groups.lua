#!lua flags=allow-oom
-- Returns the engines whose reports differ in their load alone, as JSON, "" if there is none: of each group
-- {engines, sum of their tokens per second, one of the reports}. A report that names no group (of another
-- version, see registry.py) is returned alone, without a sum. All readers share a result.
-- args: share (ms for which they do).
local shared = redis.call('GET', PREFIX .. 'groups')
if shared then return shared end
local groups, rows, now = {}, {}, now_ms()
for _, entry in ipairs(redis.call('HVALS', PREFIX .. 'engines')) do
  local seen, name, speed = string.match(entry, '^(%d+) {"group":"(%x+)","tokens_per_second":([^,]+),')
  seen = seen or string.match(entry, '^%d+') or now
  if now - seen <= ENGINE_SILENCE then
    local row = name and groups[name]
    if row then
      row[1], row[2] = row[1] + 1, row[2] + num(speed)
    else
      row = { 1, name and num(speed) or cjson.null, entry }
      rows[#rows + 1] = row
      if name then groups[name] = row end
    end
  end
end
if #rows == 0 then return '' end
local result = cjson.encode(rows)
redis.call('SET', PREFIX .. 'groups', result, 'PX', args.share)
return result
