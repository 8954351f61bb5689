#!lua flags=allow-oom
-- Ends requests that have not ended: CANCELLED, or DEADLINE for those that are overdue.
-- args: items (requests), only_overdue, window, live_ttl. Returns how many were ended.
local now, stopped = now_ms(), 0
for _, rid in ipairs(args.items) do
  local r = load(rid)
  if r and r.st ~= 'ended' and (not args.only_overdue or now >= expires(r)) then
    stop_request(r, args.only_overdue and DEADLINE or CANCELLED)
    stopped = stopped + 1
  end
end
return stopped
