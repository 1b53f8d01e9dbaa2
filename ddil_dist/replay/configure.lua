-- Change named fields of the state: the limiter's settings, or, if only larger, the newest policy version.
--
-- ARGV  1 incarnation  2... name, value.  Answers {'ok'} or {'reset'}
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return {'reset'} end
for i = 2, #ARGV, 2 do
  local name, value = ARGV[i], ARGV[i + 1]
  if name ~= 'newest' or tonumber(value) > tonumber(redis.call('HGET', KEYS[1], 'newest')) then
    redis.call('HSET', KEYS[1], name, value)
  end
end
return {'ok'}
