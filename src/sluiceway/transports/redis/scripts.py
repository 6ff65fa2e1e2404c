"""What else must happen in one step at the server. The keys are those of lua.py."""

from __future__ import annotations

from .lua import script
from .taking import TAKE, TEND

# Settlements, fenced by owner. In: group, consumer, a number of this call, and per settlement a list: which topic and
# stream, id, what, delay, a retry's copy (or whether it counts), "k" and its key where that is kept in order, outputs.
# Keys: a record of the last call, then eight per topic.
# Out: the indexes of those that are not ours, and of those whose outputs cannot be.
SETTLE = script(
    "settle",
    """
local group, me, number = ARGV[1], ARGV[2], ARGV[3]
local before = call('GET', KEYS[1])
if before then
  before = cmsgpack.unpack(before)
  if before[1] == number then return {before[2], before[3]} end
end
local lost, rejected, bells, woken = {}, {}, {}, {}
local function fits(outputs)
  for _, out in ipairs(outputs) do
    local kind = call('TYPE', out[1]).ok
    if kind ~= 'none' and kind ~= 'stream' then return false end
  end
  return true
end
for i = 4, #ARGV do
  local op, outputs = list(ARGV[i]), {}
  local which, id, what, delay = tonumber(op[2]), op[3], op[4], tonumber(op[5])
  for j = 8, #op do outputs[j - 7] = list(op[j]) end
  local base = 1 + 8 * op[1]
  local stream, retry, due = KEYS[base + which], KEYS[base + 2], KEYS[base + 3]
  local counts, lane = KEYS[base + 5], KEYS[base + 8]
  local function to(consumer, delivered)
    call('XCLAIM', stream, group, consumer, 0, id, 'RETRYCOUNT', delivered, 'JUSTID')
  end
  local function leave()
    if op[7] ~= '' and unhand(lane, op[7]:sub(2), which, id, me) then woken[retry] = true end
  end
  local function back(delivered)
    if delay > 0 then
      to(LATER, delivered)
      wait(due, now + delay, which .. id, retry, '')
    else
      to(FREE, delivered)
      bells[retry] = true
    end
  end
  local p = redis.pcall('XPENDING', stream, group, id, id, 1, me)[1]  -- none of a group that was deleted
  if not p then
    lost[#lost + 1] = i - 4
  elseif not fits(outputs) then
    rejected[#rejected + 1] = i - 4
  else
    for _, out in ipairs(outputs) do put(unpack(out)) end
    if what == 'release' then
      back(math.max(0, p[4] - 1))
    elseif what == 'again' then
      back(0)
      call('HDEL', counts, which .. id)
      if op[6] == '1' then call('HINCRBY', counts, 'f' .. which .. id, 1) end
    elseif what == 'park' then
      to(PARKED, math.max(0, p[4] - 1))
      call('ZADD', lane .. '#waits#' .. op[7]:sub(2), 0, place_of(which, id))
      call('SADD', lane .. '#keys', op[7]:sub(2))
      leave()
    else
      if what == 'retry' then put(retry, delay, due, op[6], '') end
      finish(stream, group, id, which == 2)
      call('HDEL', counts, which .. id, 'f' .. which .. id)
      leave()
    end
  end
end
for retry in pairs(woken) do wake(retry) end
for retry in pairs(bells) do ring(retry) end
call('SET', KEYS[1], cmsgpack.pack({number, lost, rejected}), 'EX', 86400)
return {lost, rejected}
""",
    lanes=True,
)

# Acks of what is kept in order, unfenced. In: group, consumer, and per message a list: which topic and stream, id, "k"
# and its key. Keys: eight per topic.
ACK = script(
    "acknowledge",
    """
local group, me, woken = ARGV[1], ARGV[2], {}
for i = 3, #ARGV do
  local at, which, id, key = unpack(list(ARGV[i]))
  local base = 8 * at
  finish(KEYS[base + which], group, id, which == '2')
  call('HDEL', KEYS[base + 5], which .. id, 'f' .. which .. id)
  if key ~= '' and unhand(KEYS[base + 8], key:sub(2), which, id, me) then woken[KEYS[base + 2]] = true end
end
for retry in pairs(woken) do wake(retry) end
""",
    lanes=True,
)

# In: group, consumer, stream (1 or 2), id, suspicions, which explain every delivery so far. Out: whether it is ours.
SUSPECT = script(
    "write down a suspicion",
    """
local stream = KEYS[tonumber(ARGV[3])]
if #call('XPENDING', stream, ARGV[1], ARGV[4], ARGV[4], 1, ARGV[2]) == 0 then return 0 end
call('XCLAIM', stream, ARGV[1], ARGV[2], 0, ARGV[4], 'RETRYCOUNT', 1 + ARGV[5], 'JUSTID')
call('HSET', KEYS[5], ARGV[3] .. ARGV[4], ARGV[5])
return 1
""",
)

# In: group, consumer, and what to keep as "1<id>" or "2<id>". All else that it holds is free again, uncounted.
LEAVE = script(
    "close a source",
    """
local group, me, keep, kept, freed = ARGV[1], ARGV[2], {}, false, false
for i = 3, #ARGV do keep[ARGV[i]] = true end
for i = 1, 2 do
  local from = '-'
  repeat
    local held = call('XPENDING', KEYS[i], group, from, '+', 1000, me)
    for _, p in ipairs(held) do
      from = '(' .. p[1]
      if keep[i .. p[1]] then
        kept = true
      else
        freed = true
        call('XCLAIM', KEYS[i], group, FREE, 0, p[1], 'RETRYCOUNT', math.max(0, p[4] - 1), 'JUSTID')
      end
    end
  until #held < 1000
end
if not kept then
  for i = 1, 2 do call('XGROUP', 'DELCONSUMER', KEYS[i], group, me) end
  call('ZREM', KEYS[4], me)
  open_all(KEYS[8], me)
end
if freed then ring(KEYS[2]) end
""",
    lanes=True,
)

# In: lease, consumer. Keys: `leases` of each topic. Out: 0 when one of them is gone.
RENEW = script(
    "renew a lease",
    """
for _, leases in ipairs(KEYS) do
  if not call('ZSCORE', leases, ARGV[2]) then return 0 end
end
for _, leases in ipairs(KEYS) do call('ZADD', leases, now + ARGV[1], ARGV[2]) end
return 1
""",
)

# In: group, retention. Deletes what all groups have finished; remembers where our own has come to.
TRIM = script(
    "trim a stream",
    """
local low_ms, low_seq
for _, info in ipairs(call('XINFO', 'GROUPS', KEYS[1])) do
  local pending = call('XPENDING', KEYS[1], info[2])
  local id = pending[1] > 0 and pending[2] or info[8]
  local ms, seq = id:match('(%d+)-(%d+)')
  ms, seq = tonumber(ms), tonumber(seq)
  if info[2] == ARGV[1] then
    local floor = id
    if pending[1] > 0 then
      floor = seq > 0 and string.format('%.0f-%.0f', ms, seq - 1) or
        string.format('%.0f-18446744073709551615', math.max(0, ms - 1))
    end
    call('SET', KEYS[6], floor)
  end
  if pending[1] == 0 then  -- a number has 53 bits: the last id of a millisecond is followed by the next one's first
    if seq < 2 ^ 53 then seq = seq + 1 else ms, seq = ms + 1, 0 end
  end
  if not low_ms or ms < low_ms or (ms == low_ms and seq < low_seq) then low_ms, low_seq = ms, seq end
end
local retention = tonumber(ARGV[2])
if low_ms and retention >= 0 then
  if now - retention < low_ms then low_ms, low_seq = now - retention, 0 end
  call('XTRIM', KEYS[1], 'MINID', '~', string.format('%.0f-%.0f', low_ms, low_seq), 'LIMIT', 0)
end
""",
)

# In: group. Out: how many wait, and the fields and ids of those that may be the oldest that are due.
BACKLOG = script(
    "count the backlog",
    """
local waits, oldest = call('ZCARD', KEYS[3]) + call('ZCARD', KEYS[7]), {}
for i = 1, 2 do
  for _, info in ipairs(call('XINFO', 'GROUPS', KEYS[i])) do
    if info[2] == ARGV[1] then
      local lag = info[12]
      if i == 2 or not lag then
        lag = 0
        for _, entry in ipairs(call('XRANGE', KEYS[i], '(' .. info[8], '+', 'COUNT', 10000)) do
          if entry[2][1] ~= 'bell' then
            if lag == 0 then oldest[#oldest + 1] = entry end
            lag = lag + 1
          end
        end
      elseif lag > 0 then
        oldest[#oldest + 1] = call('XRANGE', KEYS[i], '(' .. info[8], '+', 'COUNT', 1)[1]
      end
      waits = waits + lag
      for _, consumer in ipairs(call('XINFO', 'CONSUMERS', KEYS[i], ARGV[1])) do
        if consumer[2] == FREE or consumer[2] == LANE or consumer[2] == PARKED then
          waits = waits + consumer[4]
          for _, p in ipairs(call('XPENDING', KEYS[i], ARGV[1], '-', '+', 1, consumer[2])) do
            oldest[#oldest + 1] = call('XRANGE', KEYS[i], p[1], p[1])[1]
          end
        end
      end
    end
  end
end
return {waits, oldest}
""",
)

# In: an output: stream, delay, where it waits, fields, and for a topic how its groups' retry streams begin.
DELAY = script(
    "publish with a delay",
    """
local out = list(ARGV[1])
call('XLEN', out[1])  -- is refused where the key is no stream, as it would be when it is due
put(unpack(out))
""",
    adds=True,
)

SCRIPTS = (TEND, TAKE, SETTLE, ACK, SUSPECT, LEAVE, RENEW, TRIM, BACKLOG, DELAY)
