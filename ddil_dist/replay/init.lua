-- Open the buffer of a run, or make it. A rule that the records already obey (capacity, removal) is not changed.
--
-- ARGV  1 a fresh incarnation  2... name, value of the bounds and of the limiter's settings
-- Answers the state as name, value, ...
if redis.call('HEXISTS', KEYS[1], 'incarnation') == 0 then
  redis.call('DEL', unpack(KEYS))
  redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'head', 0, 'tail', 0, 'size', 0, 'bytes', 0, 'ops', 0,
    'threshold', 1, 'offered', 0, 'charged', 0, 'inserted', 0, 'refused', 0)
  for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
return redis.call('HGETALL', KEYS[1])
