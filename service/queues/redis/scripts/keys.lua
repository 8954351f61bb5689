-- Part of every script. KEYS[1] is the admission hash of a shard; the names of all other keys are
-- derived from it, so that they lie in one slot of a cluster. ARGV[1] is a JSON object, `args`; its
-- fields are listed in each script. Journal records, request bodies and manifests are further entries
-- of ARGV: they are stored byte for byte, and JSON would copy and escape them. Times are in ms.
local ADMISSION, args = KEYS[1], cjson.decode(ARGV[1])
local PREFIX = string.sub(ADMISSION, 1, -4) -- without 'adm'

local function request_key(rid) return PREFIX .. 'r:' .. rid end
local function journal_key(rid) return PREFIX .. 't:' .. rid end
local function submission_key(sid) return PREFIX .. 's:' .. sid end
local function num(value) return tonumber(value or 0) or 0 end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
