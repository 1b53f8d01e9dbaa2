-- Change named fields of the state: the limiter's settings, or, if only newer, what the weight store holds.
--
-- ARGV  1 incarnation  2... name, value; of 'weights' JSON with a version.  Answers {'ok'} or {'reset'}
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return {'reset'} end
for i = 2, #ARGV, 2 do
  local name, value = ARGV[i], ARGV[i + 1]
  local known = name == 'weights' and redis.call('HGET', KEYS[1], name)
  if not known or cjson.decode(value).version > cjson.decode(known).version then
    redis.call('HSET', KEYS[1], name, value)
  end
end
return {'ok'}
