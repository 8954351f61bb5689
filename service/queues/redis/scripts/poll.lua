#!lua flags=allow-oom
-- A cheap first look for work, and a heartbeat. Returns 0 if `claim` has something to do, and -1 if it
-- has to look for orphans; otherwise the engine waits, and the script returns how many of its kind do.
-- args: engine, kind, report (the engine's), waits (ms), orphans (as in `claim`).
local queued, suspects, blamed = PREFIX .. 'since', PREFIX .. 'suspects', PREFIX .. 'blamed:' .. args.engine
if redis.call('EXISTS', queued, suspects, blamed) > 0 then return 0 end
if args.orphans and may_seek_orphans(args.kind, args.orphans) then return -1 end
redis.call('HSET', PREFIX .. 'engines', args.engine, now_ms() .. ' ' .. args.report)
return wait_for_work(args.kind, args.engine)
