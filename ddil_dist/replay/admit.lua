-- Several shards: the first one keeps the limiter. Charge a batch to it once, before another shard stores it.
--
-- ARGV  1 incarnation  2 writer  3 batch  4 records.  Answers {'ok'}, {'wait', offered, charged} or {'reset'}
-- The note of the last batch charged is a hash of its own, KEYS[6] here.
local state = read_state('incarnation', 'offered', 'charged', 'samples_per_insert', 'min_size', 'error_buffer')
if state.incarnation ~= ARGV[1] then return {'reset'} end
if redis.call('HGET', KEYS[6], ARGV[2]) == ARGV[3] then return {'ok'} end
local num = tonumber(ARGV[4])
if not may_insert(state, num) then return {'wait', tostring(state.offered), tostring(state.charged)} end
redis.call('HSET', KEYS[6], ARGV[2], ARGV[3])
if redis.call('HLEN', KEYS[6]) > WRITERS then redis.call('RENAME', KEYS[6], KEYS[7]) end
redis.call('HINCRBY', KEYS[1], 'offered', num)
return {'ok'}
