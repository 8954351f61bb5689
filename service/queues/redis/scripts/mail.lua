-- Messages to the mailboxes of processes; see keys.py. The first letter is their kind:
--   s <request>: a running request of this process was stopped
--   j, and per record "<request> <entry id> <field> <length>\n<record>": new entries of journals
-- What is collected has to be sent at the end of the script.
local outbox = {}

local function post(mailbox, message) return redis.call('SPUBLISH', PREFIX .. 'm:' .. mailbox, message) end

-- A new entry, for the mailboxes that read this journal (the field `rd` of a request).
local function collect(readers, rid, id, field, record)
  local entry = rid .. ' ' .. id .. ' ' .. field .. ' ' .. #record .. '\n' .. record
  for mailbox in string.gmatch(readers, '%S+') do
    local entries = outbox[mailbox]
    if entries then entries[#entries + 1] = entry else outbox[mailbox] = { 'j', entry } end
  end
end

local function send_collected()
  for mailbox, entries in pairs(outbox) do post(mailbox, table.concat(entries)) end
  outbox = {}
end
