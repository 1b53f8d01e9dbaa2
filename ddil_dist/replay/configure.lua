-- Change named fields of the state: the limiter's settings, or, if only newer, what the weight store holds.
--
-- ARGV  1 incarnation  2... name, value; of 'weights' JSON with a version, or nothing: that none are held any more.
-- Answers {'ok'} or {'reset'}
local function version_of(text)
  local read, found = pcall(cjson.decode, text)
  return read and type(found) == 'table' and tonumber(found.version) or -1
end
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return {'reset'} end
for i = 2, #ARGV, 2 do
  local name, value = ARGV[i], ARGV[i + 1]
  local known = name == 'weights' and redis.call('HGET', KEYS[1], name)
  if name == 'weights' and value == '' then
    redis.call('HDEL', KEYS[1], name)
  elseif not known or version_of(value) > version_of(known) then
    redis.call('HSET', KEYS[1], name, value)
  end
end
return {'ok'}
