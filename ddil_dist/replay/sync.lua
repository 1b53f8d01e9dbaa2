-- What changed since a reader last looked. Changes nothing.
--
-- ARGV  1 incarnation that the reader knows ('' at first)  2 log entries that it has applied (-1: none, send all)
-- Answers {'reset'} where there is no buffer or another incarnation, else
--         {'changes' | 'all', ops, log entries | all meta, state as name, value, ...}
local incarnation = redis.call('HGET', KEYS[1], 'incarnation')
if incarnation ~= ARGV[1] then return {'reset', incarnation or ''} end
local state = redis.call('HGETALL', KEYS[1])
local ops = tonumber(redis.call('HGET', KEYS[1], 'ops'))
local known = tonumber(ARGV[2])
if known < 0 or known > ops or ops - known > LOG then
  return {'all', tostring(ops), redis.call('GET', KEYS[3]) or '', state}
end
local parts = {}
while known < ops do
  local place = known % LOG
  local last = math.min(LOG, place + ops - known)
  parts[#parts + 1] = redis.call('GETRANGE', KEYS[4], place * 16, last * 16 - 1)
  known = known + last - place
end
return {'changes', tostring(ops), table.concat(parts), state}
