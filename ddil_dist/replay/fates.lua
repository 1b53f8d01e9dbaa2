-- What becomes of states: whether a sample ever has one, by its timestep and the actor that made it. Loaded after
-- common.lua in front of the scripts that write records or sample them.
--
-- KEYS  9 origins string, ORIGIN bytes a slot: the number of the actor that made its record u32, 0 of none; timestep i16
--       10 used   string, a byte a slot: 1 where a sample has had its record
--       11 fates  hash: states ever inserted by timestep (it:) and actor's number (ia:), those of them that a sample has
--                 had (ut:, ua:), the numbers of actors by name (a:), and how many actors there are
local ORIGIN = 6
local NOBODY = string.rep('\0', ORIGIN)
local TIMESTEP
for i, kind in ipairs(COUNTED) do
  if kind == 't' then TIMESTEP = i end
end

-- The record's size and its timestep.
local function size_and_timestep(meta)
  local parts = {struct.unpack(UNPACK, meta)}
  return parts[#COUNTED + 1], parts[TIMESTEP]
end

-- How the account is written: a script to which it is no more than that may go on where the server has no room for it.
local write = redis.call

local fates = {it = {}, ia = {}, ut = {}, ua = {}}

local function note(kind, key, num)
  fates[kind][key] = (fates[kind][key] or 0) + num
end

-- Origins of slots in a row, to be written at once; no sample has had their records.
local run_begin, run = -1, {}

local function write_run()
  if #run > 0 then
    redis.call('SETRANGE', KEYS[9], run_begin * ORIGIN, table.concat(run))
    redis.call('SETRANGE', KEYS[10], run_begin, string.rep('\0', #run))
    run = {}
  end
end

local function write_origin(slot, origin)
  if slot ~= run_begin + #run then
    write_run()
    run_begin = slot
  end
  run[#run + 1] = origin
end

local function read_origin(slot)
  local origin = redis.call('GETRANGE', KEYS[9], slot * ORIGIN, slot * ORIGIN + ORIGIN - 1)
  if #origin < ORIGIN then return NOBODY end
  return origin
end

-- Have a slot hold what another holds. That one is to be emptied, or written.
local function move(from, to)
  write_run()
  redis.call('HSET', KEYS[2], to, redis.call('HGET', KEYS[2], from))
  write_meta(to, read_meta(from))
  redis.call('SETRANGE', KEYS[9], to * ORIGIN, read_origin(from))
  local used = redis.call('GETRANGE', KEYS[10], from, from)
  if used ~= '' then redis.call('SETRANGE', KEYS[10], to, used) end
end

local function empty(slot)
  redis.call('HDEL', KEYS[2], slot)
  write_meta(slot, EMPTY)
  write_origin(slot, NOBODY)
end

-- Samples have the records of these slots, packed u32s: each counts once, however often they do.
local function use(slots)
  for at = 1, #slots, 4 do
    local slot = struct.unpack('<I', slots, at)
    local actor, timestep = struct.unpack('<Ih', read_origin(slot))
    if write('SETBIT', KEYS[10], slot * 8 + 7, 1) == 0 and actor > 0 then
      note('ut', timestep, 1)
      note('ua', actor, 1)
    end
  end
end

local function settle_fates()
  write_run()
  for kind, counts in pairs(fates) do
    for key, num in pairs(counts) do write('HINCRBY', KEYS[11], kind .. ':' .. key, num) end
  end
end
