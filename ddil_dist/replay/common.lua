-- Shared by the scripts of one replay shard; loaded in front of each. Plain Lua 5.1: Redis 6.2, 7 and Valkey run it.
-- In front of it go, from the declaration of records (scripts.py): META, bytes of meta a slot; UNPACK, its format, the
-- record's size last; COUNTED, what its other parts are counted under.
--
-- KEYS  1 state   hash: counters, bounds, rate limiter
--       2 data    hash: slot -> record
--       3 meta    string, META bytes a slot: source u8 first, policy version, timestep and the like, size u32
--       4 log     string, a ring of LOG entries of ENTRY bytes: slot u32, then that slot's new bytes of meta.
--                 Entry number k (counted from 0 by state.ops) lies at (k % LOG) * ENTRY: readers follow it
--       5 counts  hash: live records by source (s:), policy version (v:), timestep (t:) and the like; no zero stays
--       6 writers hash: writer -> "newest batch:bits of the 32 newest"; 7 the generation before
--       8 clients sorted set: who samples and inserts, by when they last did (account.lua)
--       9 origins, 10 used, 11 fates: see fates.lua
local LOG = 65536
local ENTRY = META + 4
local EMPTY = string.char(255) .. string.rep('\0', META - 1)
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

local entries, deltas = {}, {}
for _, kind in ipairs(COUNTED) do deltas[kind] = {} end

-- Note that a record comes (1) or goes (-1); its size in bytes.
local function count(meta, sign)
  local parts = {struct.unpack(UNPACK, meta)}
  for i, kind in ipairs(COUNTED) do
    local part = parts[i]
    deltas[kind][part] = (deltas[kind][part] or 0) + sign
  end
  return parts[#COUNTED + 1]
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
    redis.call('SETRANGE', KEYS[4], place * ENTRY, table.concat(entries, '', first, last))
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
