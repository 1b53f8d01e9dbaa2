-- Count samples against the limiter, before they are fetched; once, however often the call is repeated.
--
-- ARGV  1 incarnation  2 the call's own name  3 samples  4 live records of all shards
--       5 slots of this shard that the client has not told of before, packed u32s
--       6... source, samples, source, samples, ...
-- Answers 1, or without any change 0 (wait) or -1 (no such incarnation)
local REMEMBERED_S = 3600
local state = read_state('incarnation', 'offered', 'charged', 'samples_per_insert', 'min_size', 'error_buffer')
if state.incarnation ~= ARGV[1] then return -1 end
local done = KEYS[1] .. '-charge-' .. ARGV[2]
if redis.call('EXISTS', done) == 1 then return 1 end
local num = tonumber(ARGV[3])
if tonumber(ARGV[4]) < state.min_size or not may_sample(state, num) then return 0 end
redis.call('SET', done, 1, 'EX', REMEMBERED_S)
redis.call('HINCRBY', KEYS[1], 'charged', num)
for i = 6, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[1], 'sampled:' .. ARGV[i], ARGV[i + 1])
end
use(ARGV[5])
settle_fates()
return 1
