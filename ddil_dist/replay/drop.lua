-- Take a record that nobody can read out of the buffer, and count it as refused.
--
-- ARGV  1 incarnation  2 slot  3 the record's bytes as found (another record may lie there by now)
-- Answers {'ok'}, {'gone'} or {'reset'}
local state = read_state('incarnation', 'removal', 'size', 'bytes', 'ops')
if state.incarnation ~= ARGV[1] then return {'reset'} end
local slot = tonumber(ARGV[2])
local meta = read_meta(slot)
if meta == EMPTY or redis.call('HGET', KEYS[2], slot) ~= ARGV[3] then return {'gone'} end
redis.call('HINCRBY', KEYS[1], 'refused', 1)
state.bytes = state.bytes - count(meta, -1)
state.size = state.size - 1
if state.removal == 'reservoir' and slot ~= state.size then
  move(state.size, slot)
  slot = state.size
end
empty(slot)
settle(state)
settle_fates()
redis.call('HSET', KEYS[1], 'size', state.size, 'bytes', state.bytes, 'ops', state.ops)
return {'ok'}
