-- Note which records a sample has, where no charge tells of it: on all shards but the first, and where it draws again.
--
-- ARGV  1 incarnation  2 slots, packed u32s
-- Answers 1; of another incarnation nothing is noted
write = redis.pcall
if redis.call('HGET', KEYS[1], 'incarnation') == ARGV[1] then
  use(ARGV[2])
  settle_fates()
end
return 1
