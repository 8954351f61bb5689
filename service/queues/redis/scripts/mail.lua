-- Messages to engines and to the mailboxes of readers; see keys.py. The first letter is their kind:
--   w: there may be something to claim      r: a request was released, or its lease is over
--   s <request>: a running request of this engine was stopped
--   j, and per record a head "<request> <entry id> <field> <length>\n" and the record: new entries of
--   journals
local outbox, readers_boxes = {}, {}
local KINDS = PREFIX .. 'kinds'

-- Returns how many processes got it: 0 or 1.
local function post(name, message) return redis.call('SPUBLISH', PREFIX .. 'm:' .. name, message) end

-- A new entry, for the mailboxes that read this journal (the field `rd` of a request). What is
-- collected has to be sent before the script ends.
local function collect(readers, head, record)
  local boxes = readers_boxes[readers]
  if not boxes then
    boxes = {}
    for mailbox in string.gmatch(readers, '%S+') do
      outbox[mailbox] = outbox[mailbox] or { 'j' }
      boxes[#boxes + 1] = outbox[mailbox]
    end
    readers_boxes[readers] = boxes
  end
  for i = 1, #boxes do
    local box = boxes[i]
    local size = #box
    box[size + 1], box[size + 2] = head, record
  end
end

local function send_collected()
  for mailbox, entries in pairs(outbox) do post(mailbox, table.concat(entries)) end
  outbox, readers_boxes = {}, {}
end

-- Engines of one kind are equal to the scripts: "<numeric class>\n<features>".
local function waiting_key(kind) return PREFIX .. 'waiting:' .. kind end

-- Enters an engine as one that waits. Reads args.waits. Returns how many of its kind do.
local function wait_for_work(kind, engine)
  local key, now = waiting_key(kind), now_ms()
  redis.call('SADD', KINDS, kind)
  redis.call('ZADD', key, now + args.waits, engine)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  redis.call('PEXPIRE', KINDS, args.waits)
  redis.call('PEXPIRE', key, args.waits)
  return redis.call('ZCARD', key)
end

-- Whether no engine of a kind has looked for orphans for so many ms; then this one does.
local function may_seek_orphans(kind, pause)
  return pause == 0 or redis.call('SET', PREFIX .. 'looked:' .. kind, 1, 'NX', 'PX', pause)
end

local function has_all(features, needed)
  for name in string.gmatch(needed, '%S+') do
    if not string.find(' ' .. features .. ' ', ' ' .. name .. ' ', 1, true) then return false end
  end
  return true
end

-- Wakes one engine that has the features `needed` and, unless that is '', is of the numeric class: the
-- first of those `preferred` that wait, or the one that has waited longest. An engine that is gone does
-- not get the message, and the next one does.
local function wake(needed, class, message, preferred)
  local keys = {}
  for _, kind in ipairs(redis.call('SMEMBERS', KINDS)) do
    local its_class, features = string.match(kind, '^(.*)\n(.*)$')
    if (class == '' or class == its_class) and has_all(features, needed) then
      keys[#keys + 1] = waiting_key(kind)
    end
  end
  for _, key in ipairs(keys) do
    for _, engine in ipairs(preferred or {}) do
      if redis.call('ZREM', key, engine) == 1 and post(engine, message) > 0 then return end
    end
  end
  for _, key in ipairs(keys) do
    local engine = redis.call('ZPOPMIN', key)[1]
    while engine do
      if post(engine, message) > 0 then return end
      engine = redis.call('ZPOPMIN', key)[1]
    end
  end
end
