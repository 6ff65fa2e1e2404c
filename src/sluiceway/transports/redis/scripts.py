"""What must happen in one step at the server, in Lua. Times are the server's, in milliseconds.

Keys of a group on a topic, in this order (see keys.py): the topic's stream, the retry stream, `due` (a sorted set of
what waits for its time: "1<id>" and "2<id>" for entries of the two streams that stay pending, "c<fields>" for copies),
`leases` (a sorted set of consumers), `suspicions` (a hash), `floor` (a string), and the topic's own `due`.
"""

from __future__ import annotations

import hashlib

from msgspec import Struct

FREE = "sluiceway:free"  # the consumer of what was handed back
LATER = "sluiceway:later"  # and of what was handed back until it is due


class Script(Struct, frozen=True):
    """One script; `what` it does, for errors."""

    what: str
    text: str
    sha: str


def _script(what: str, text: str) -> Script:
    text = _COMMON + text
    return Script(what, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_COMMON = f"""
local call, FREE, LATER = redis.call, '{FREE}', '{LATER}'
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local function list(packed)
  local found, at = {{}}, 1
  while at <= #packed do found[#found + 1], at = struct.unpack('>I4c0', packed, at) end
  return found
end
local function ring(retry)
  call('XADD', retry, '*', 'bell', '1')
end
local function finish(stream, group, id, own)
  call('XACK', stream, group, id)
  if own then call('XDEL', stream, id) end
end
local function wait(due, score, member, bell, head)
  call('ZADD', due, score, member)
  if call('ZRANK', due, member) > 0 then return end
  if head == '' then return ring(bell) end
  local groups = redis.pcall('XINFO', 'GROUPS', bell)
  for _, info in ipairs(groups.err and {{}} or groups) do
    if call('EXISTS', head .. info[2]) == 1 then ring(head .. info[2]) end
  end
end
local function put(stream, delay, due, fields, head)
  delay = tonumber(delay)
  if delay > 0 then
    wait(due, now + delay, 'c' .. fields, stream, head)
  else
    call('XADD', stream, '*', unpack(list(fields), 2))
  end
end
"""

# In: group, consumer, lease, demand, whether others may be found dead, whether we come to be known, ids of bells.
# Out: 0 when our lease is gone; else 1, ms until something is due (-1), whether more is free, how many entries are
# gone, and what we took: which stream, id, times delivered, suspicions, fields.
TEND = _script(
    "receive",
    """
local main, retry, due, leases, suspicions, _, topic_due = unpack(KEYS)
local group, me, lease, want = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local streams = {main, retry}
if ARGV[6] == '1' then call('ZADD', leases, now + lease, me) end
for i = 7, #ARGV do finish(retry, group, ARGV[i], true) end
if ARGV[5] == '1' then
  for _, dead in ipairs(call('ZRANGEBYSCORE', leases, '-inf', '(' .. now, 'LIMIT', 0, 20)) do
    for _, stream in ipairs(streams) do
      repeat
        local held = call('XPENDING', stream, group, '-', '+', 1000, dead)
        for _, p in ipairs(held) do
          call('XCLAIM', stream, group, FREE, 0, p[1], 'RETRYCOUNT', p[4], 'JUSTID')
        end
      until #held < 1000
      call('XGROUP', 'DELCONSUMER', stream, group, dead)
    end
    call('ZREM', leases, dead)
  end
end
if not call('ZSCORE', leases, me) then return {0} end
call('ZADD', leases, now + lease, me)
local function move(from, to)
  for _, member in ipairs(call('ZRANGEBYSCORE', from, '-inf', now, 'LIMIT', 0, 1000)) do
    local kind, rest = member:sub(1, 1), member:sub(2)
    if kind == 'c' then
      call('XADD', to, '*', unpack(list(rest), 2))
    else
      call('XCLAIM', streams[tonumber(kind)], group, FREE, 0, rest, 'JUSTID')
    end
    call('ZREM', from, member)
  end
end
move(topic_due, main)
move(due, retry)
local taken, gone = {}, 0
for i, stream in ipairs(streams) do
  if want > 0 then
    for _, p in ipairs(call('XPENDING', stream, group, '-', '+', want, FREE)) do
      local entry = call('XCLAIM', stream, group, me, 0, p[1], 'RETRYCOUNT', p[4] + 1)[1]
      local known = call('HGET', suspicions, i .. p[1]) or '0'
      if not entry or not entry[2] then
        gone = gone + 1
        finish(stream, group, p[1])
        call('HDEL', suspicions, i .. p[1])
      elseif entry[2][1] == 'bell' then
        finish(stream, group, p[1], true)
      else
        taken[#taken + 1] = {i, p[1], p[4] + 1, known, entry[2]}
        want = want - 1
      end
    end
  end
end
if want > 0 then
  local found = call('XREADGROUP', 'GROUP', group, me, 'COUNT', want, 'STREAMS', retry, '>')
  for _, entry in ipairs(found and found[1][2] or {}) do
    if entry[2][1] == 'bell' then
      finish(retry, group, entry[1], true)
    else
      taken[#taken + 1] = {2, entry[1], 1, '0', entry[2]}
    end
  end
end
local more = 0
for _, stream in ipairs(streams) do
  if #call('XPENDING', stream, group, '-', '+', 1, FREE) > 0 then more = 1 end
end
if more == 1 then ring(retry) end
local soonest = -1
for _, from in ipairs({due, topic_due}) do
  local first = call('ZRANGE', from, 0, 0, 'WITHSCORES')[2]
  if first and (soonest < 0 or first - now < soonest) then soonest = math.max(0, first - now) end
end
return {1, soonest, more, gone, taken}
""",
)

# Settlements, fenced by owner. In: group, consumer, a number of this call, and per settlement a list: which topic and
# stream, id, what, delay, a retry's copy, outputs. Keys: a record of the last call, then seven per topic.
# Out: the indexes of those that are not ours, and of those whose outputs cannot be.
SETTLE = _script(
    "settle",
    """
local group, me, number = ARGV[1], ARGV[2], ARGV[3]
local before = call('GET', KEYS[1])
if before then
  before = cmsgpack.unpack(before)
  if before[1] == number then return {before[2], before[3]} end
end
local lost, rejected, bells = {}, {}, {}
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
  for j = 7, #op do outputs[j - 6] = list(op[j]) end
  local base = 1 + 7 * op[1]
  local stream, retry, due, suspicions = KEYS[base + which], KEYS[base + 2], KEYS[base + 3], KEYS[base + 5]
  local p = redis.pcall('XPENDING', stream, group, id, id, 1, me)[1]  -- none of a group that was deleted
  if not p then
    lost[#lost + 1] = i - 4
  elseif not fits(outputs) then
    rejected[#rejected + 1] = i - 4
  else
    for _, out in ipairs(outputs) do put(unpack(out)) end
    if what == 'release' then
      local to = delay > 0 and LATER or FREE
      call('XCLAIM', stream, group, to, 0, id, 'RETRYCOUNT', math.max(0, p[4] - 1), 'JUSTID')
      if delay > 0 then wait(due, now + delay, which .. id, retry, '') else bells[retry] = true end
    else
      if what == 'retry' then put(retry, delay, due, op[6], '') end
      finish(stream, group, id, which == 2)
      call('HDEL', suspicions, which .. id)
    end
  end
end
for retry in pairs(bells) do ring(retry) end
call('SET', KEYS[1], cmsgpack.pack({number, lost, rejected}), 'EX', 86400)
return {lost, rejected}
""",
)

# In: group, consumer, stream (1 or 2), id, suspicions, which explain every delivery so far. Out: whether it is ours.
SUSPECT = _script(
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
LEAVE = _script(
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
end
if freed then ring(KEYS[2]) end
""",
)

# In: lease, consumer. Keys: `leases` of each topic. Out: 0 when one of them is gone.
RENEW = _script(
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
TRIM = _script(
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
  if pending[1] == 0 then seq = seq + 1 end
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
BACKLOG = _script(
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
        if consumer[2] == FREE then waits = waits + consumer[4] end
      end
      for _, p in ipairs(call('XPENDING', KEYS[i], ARGV[1], '-', '+', 1, FREE)) do
        oldest[#oldest + 1] = call('XRANGE', KEYS[i], p[1], p[1])[1]
      end
    end
  end
end
return {waits, oldest}
""",
)

# In: an output: stream, delay, where it waits, fields, and for a topic how its groups' retry streams begin.
DELAY = _script("publish with a delay", "put(unpack(list(ARGV[1])))")

SCRIPTS = (TEND, SETTLE, SUSPECT, LEAVE, RENEW, TRIM, BACKLOG, DELAY)
