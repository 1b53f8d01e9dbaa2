-- Add waiting times, and note that a client is at work. KEYS[8]: sorted set, clients by when they last were.
--
-- ARGV  1 incarnation  2 client, as "sample:..." or "insert:..."  3... name, milliseconds.  Answers {'ok'} or {'reset'}
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return {'reset'} end
local now = tonumber(redis.call('TIME')[1])
redis.call('ZADD', KEYS[8], now, ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[8], '-inf', now - 15)
for i = 3, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], 'wait:' .. ARGV[i], ARGV[i + 1]) end
return {'ok'}
