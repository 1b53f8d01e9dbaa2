-- What changed since a reader last looked. Changes nothing.
--
-- ARGV  1 incarnation that the reader knows
--       2 log entries that it has applied; -1: none, send all; -2: it wants the state only
-- Answers {'reset'} where there is no buffer or another incarnation, else
--         {'changes' | 'all', log entries | all meta, state as name, value, ...}
local state = redis.call('HGETALL', KEYS[1])
local found, ops
for i = 1, #state, 2 do
  if state[i] == 'incarnation' then found = state[i + 1] end
  if state[i] == 'ops' then ops = tonumber(state[i + 1]) end
end
if found ~= ARGV[1] then return {'reset'} end
local known = tonumber(ARGV[2])
if known == -2 then return {'changes', '', state} end
if known < 0 or known > ops or ops - known > LOG then
  return {'all', redis.call('GET', KEYS[3]) or '', state}
end
local parts = {}
while known < ops do
  local place = known % LOG
  local last = math.min(LOG, place + ops - known)
  parts[#parts + 1] = redis.call('GETRANGE', KEYS[4], place * ENTRY, last * ENTRY - 1)
  known = known + last - place
end
return {'changes', table.concat(parts), state}
