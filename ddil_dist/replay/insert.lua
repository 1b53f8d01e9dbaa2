-- Store one batch, atomically and exactly once; takes no part of a batch.
--
-- ARGV  1 incarnation  2 writer  3 batch  4 '1': consult and charge the limiter  5 random seed  6 layout
--       7 actor  8 meta of the records  9... records
-- Answers {'stored'} or {'duplicate'}, or without any change {'wait', offered, charged} (limiter),
--         {'reset'} (not that incarnation), {'layout', ours}, {'old', newest batch}
local state = read_state('incarnation', 'capacity', 'capacity_bytes', 'removal', 'layout', 'head', 'tail', 'size',
  'bytes', 'ops', 'threshold', 'offered', 'charged', 'samples_per_insert', 'min_size', 'error_buffer')
if state.incarnation ~= ARGV[1] then return {'reset'} end

local writer, batch, metas = ARGV[2], tonumber(ARGV[3]), ARGV[8]
local num = #metas / META

-- Exactly once: the newest batch number of this writer, and which of the 31 before it are stored.
local known = redis.call('HGET', KEYS[6], writer) or redis.call('HGET', KEYS[7], writer)
local bits = 1
if known then
  local newest, mask = string.match(known, '^(%d+):(-?%d+)$')
  newest, mask = tonumber(newest), tonumber(mask)
  if batch > newest then
    local shift = batch - newest
    bits = 1
    if shift < 32 then bits = bit.bor(bit.lshift(mask, shift), 1) end
  else
    local back = newest - batch
    if back >= 32 then return {'old', tostring(newest)} end
    if bit.band(bit.rshift(mask, back), 1) == 1 then return {'duplicate'} end
    bits = bit.bor(mask, bit.lshift(1, back))
    batch = newest
  end
end
if state.layout and state.layout ~= ARGV[6] then return {'layout', state.layout} end
if ARGV[4] == '1' and not may_insert(state, num) then
  return {'wait', tostring(state.offered), tostring(state.charged)}
end

-- The first write is one that a full server refuses; after it, a script runs to its end.
redis.call('HSET', KEYS[6], writer, string.format('%.0f:%.0f', batch, bits))
if redis.call('HLEN', KEYS[6]) > WRITERS then redis.call('RENAME', KEYS[6], KEYS[7]) end

local function fits(live, size)
  return live < state.capacity and state.bytes + size <= state.capacity_bytes
end

local freed = {}

local function insert_oldest_first(i, meta, size, origin)
  while state.tail < state.head
    and (state.head - state.tail >= state.capacity or state.bytes + size > state.capacity_bytes) do
    local slot = state.tail % state.capacity
    local old = read_meta(slot)
    if old ~= EMPTY then
      state.bytes = state.bytes - count(old, -1)
      state.size = state.size - 1
      freed[slot] = true
    end
    state.tail = state.tail + 1
  end
  local slot = state.head % state.capacity
  freed[slot] = nil
  state.head = state.head + 1
  redis.call('HSET', KEYS[2], slot, ARGV[8 + i])
  write_meta(slot, meta)
  write_origin(slot, origin)
  return true
end

-- Every record holds a uniform random key; kept are those under a threshold that only falls. Given how many are
-- under it, the largest of their keys is a uniform choice, and the threshold falls to it: no key need be stored.
local function insert_reservoir(i, meta, size, origin)
  if math.random() >= state.threshold then return false end
  local slot = state.size
  while not fits(state.size, size) do
    state.threshold = state.threshold * math.random() ^ (1 / (state.size + 1))
    local victim = math.floor(math.random() * (state.size + 1))
    if victim >= state.size then return false end
    state.bytes = state.bytes - count(read_meta(victim), -1)
    state.size = state.size - 1
    slot = victim
    if not fits(state.size, size) then
      local last = state.size
      if victim ~= last then move(last, victim) end
      empty(last)
      slot = last
    end
  end
  redis.call('HSET', KEYS[2], slot, ARGV[8 + i])
  write_meta(slot, meta)
  write_origin(slot, origin)
  return true
end

local actor = redis.call('HGET', KEYS[11], 'a:' .. ARGV[7])
if not actor then
  actor = redis.call('HINCRBY', KEYS[11], 'actors', 1)
  redis.call('HSET', KEYS[11], 'a:' .. ARGV[7], actor)
end
note('ia', actor, num)
local origins = {}

local place = insert_oldest_first
if state.removal == 'reservoir' then
  math.randomseed(tonumber(ARGV[5]))
  place = insert_reservoir
end
for i = 1, num do
  local meta = string.sub(metas, (i - 1) * META + 1, i * META)
  local size, timestep = size_and_timestep(meta)
  note('it', timestep, 1)
  origins[timestep] = origins[timestep] or struct.pack('<Ih', actor, timestep)
  if place(i, meta, size, origins[timestep]) then
    count(meta, 1)
    state.size = state.size + 1
    state.bytes = state.bytes + size
  end
end
for slot in pairs(freed) do
  empty(slot)
end
settle(state)
settle_fates()
redis.call('HSET', KEYS[1], 'head', state.head, 'tail', state.tail, 'size', state.size, 'bytes', state.bytes,
  'ops', state.ops, 'threshold', state.threshold, 'layout', ARGV[6])
redis.call('HINCRBY', KEYS[1], 'inserted', num)
if ARGV[4] == '1' then redis.call('HINCRBY', KEYS[1], 'offered', num) end
return {'stored'}
