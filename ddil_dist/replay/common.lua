-- Shared by the scripts of one replay shard; loaded in front of each. Plain Lua 5.1: Redis 6.2, 7 and Valkey run it.
--
-- KEYS  1 state   hash: counters, bounds, rate limiter
--       2 data    hash: slot -> record
--       3 meta    string, 12 bytes a slot: source u8, flags u8, timestep i16, policy version i32, size u32
--       4 log     string, a ring of LOG entries of 16 bytes: slot u32, then that slot's new 12 bytes of meta.
--                 Entry number k (counted from 0 by state.ops) lies at (k % LOG) * 16: readers follow it
--       5 counts  hash: live records by source (s:), policy version (v:) and timestep (t:); no zero stays
--       6 writers hash: writer -> "newest batch:bits of the 32 newest"; 7 the generation before
--       8 clients sorted set: who samples and inserts, by when they last did (account.lua)
local LOG = 65536
local META = 12
local EMPTY = string.char(255) .. string.rep('\0', 11)
local WRITERS = 4096

local function read_state(...)
  local names = {...}
  local values = redis.call('HMGET', KEYS[1], unpack(names))
  local state = {}
  for i, name in ipairs(names) do
    state[name] = tonumber(values[i]) or values[i] or nil
  end
  return state
end

local entries, deltas = {}, {s = {}, t = {}, v = {}}

local function count(meta, sign)
  local source, _, timestep, version, size = struct.unpack('<BBhiI', meta)
  deltas.s[source] = (deltas.s[source] or 0) + sign
  deltas.t[timestep] = (deltas.t[timestep] or 0) + sign
  deltas.v[version] = (deltas.v[version] or 0) + sign
  return size
end

local function read_meta(slot)
  local meta = redis.call('GETRANGE', KEYS[3], slot * META, slot * META + META - 1)
  if #meta < META then return EMPTY end
  return meta
end

local function write_meta(slot, meta)
  redis.call('SETRANGE', KEYS[3], slot * META, meta)
  entries[#entries + 1] = struct.pack('<I', slot) .. meta
end

-- Append the noted entries to the log and the noted differences to the counts.
local function settle(state)
  local first = math.max(1, #entries - LOG + 1)
  local at = state.ops + first - 1
  while first <= #entries do
    local place = at % LOG
    local last = math.min(#entries, first + LOG - place - 1)
    redis.call('SETRANGE', KEYS[4], place * 16, table.concat(entries, '', first, last))
    at = at + last - first + 1
    first = last + 1
  end
  state.ops = state.ops + #entries
  for kind, changes in pairs(deltas) do
    for key, change in pairs(changes) do
      if change ~= 0 then
        local field = kind .. ':' .. key
        if redis.call('HINCRBY', KEYS[5], field, change) == 0 then
          redis.call('HDEL', KEYS[5], field)
        end
      end
    end
  end
end

-- Reverb's limiter (see limiter.py). The cursor is inserts * samples_per_insert - samples.
local function may_insert(state, num)
  if state.offered < state.min_size then return true end
  local offset = state.samples_per_insert * state.min_size
  return (state.offered + num) * state.samples_per_insert - state.charged <= offset + state.error_buffer
end

local function may_sample(state, num)
  local offset = state.samples_per_insert * state.min_size
  return state.offered * state.samples_per_insert - state.charged - num >= offset - state.error_buffer
end
