-- Add waiting times, and note that a client of this role is alive.
--
-- ARGV  1 incarnation  2 role  3 client  4... name, milliseconds.  Answers {'ok'} or {'reset'}
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return {'reset'} end
for i = 4, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], 'wait:' .. ARGV[i], ARGV[i + 1]) end
return {'ok'}
