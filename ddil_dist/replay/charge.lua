-- Count samples against the limiter, before they are fetched.
--
-- ARGV  1 incarnation  2 samples  3 live records of all shards  4... source, samples, source, samples, ...
-- Answers 1, or without any change 0 (wait) or -1 (no such incarnation)
local state = read_state('incarnation', 'offered', 'charged', 'samples_per_insert', 'min_size', 'error_buffer')
if state.incarnation ~= ARGV[1] then return -1 end
local num = tonumber(ARGV[2])
if tonumber(ARGV[3]) < state.min_size or not may_sample(state, num) then return 0 end
redis.call('HINCRBY', KEYS[1], 'charged', num)
for i = 4, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[1], 'sampled:' .. ARGV[i], ARGV[i + 1])
end
return 1
