"""How messages are taken: by sources without an order, and by those that keep each key's. The keys are those of lua.py.

In: group, consumer, lease, demand, whether others may be found dead, whether we come to be known, ids of bells.
Out: 0 when our lease is gone; else 1, ms until something is due (-1), whether to come again at once, how many entries
are gone, and what we took: which stream, id, times delivered, suspicions, failures, fields. In order also, when
nothing was taken: the last ids of the topic, of the retry stream and of the wake stream, to wait behind.
"""

from __future__ import annotations

from .lua import script

_TEND = """
local main, retry, due, leases, counts, _, topic_due, lane = unpack(KEYS)
local group, me, lease, want = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local streams, taken, gone = {main, retry}, {}, 0
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
    open_all(lane, dead)
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
local function forget(which, id)
  gone = gone + 1
  finish(streams[which], group, id, which == 2)
  call('HDEL', counts, which .. id, 'f' .. which .. id)
end
local function take(which, id, delivered)
  local entry = call('XCLAIM', streams[which], group, me, 0, id, 'RETRYCOUNT', delivered)[1]
  if not entry or not entry[2] then return forget(which, id) end
  if entry[2][1] == 'bell' then return finish(streams[which], group, id, true) end
  local known = call('HMGET', counts, which .. id, 'f' .. which .. id)
  taken[#taken + 1] = {which, id, delivered, known[1] or '0', known[2] or '0', entry[2]}
  want = want - 1
  return (key_of(entry[2]))
end
local function soonest()
  local found = -1
  for _, from in ipairs({due, topic_due}) do
    local first = call('ZRANGE', from, 0, 0, 'WITHSCORES')[2]
    if first and (found < 0 or first - now < found) then found = math.max(0, first - now) end
  end
  return found
end
"""

# What waits for its turn in a lane is taken too: a source without an order holds nothing up.
TEND = script(
    "receive",
    _TEND
    + """
local more = 0
for i, stream in ipairs(streams) do
  for _, from in ipairs({FREE, LANE, PARKED}) do
    if want > 0 then
      for _, p in ipairs(call('XPENDING', stream, group, '-', '+', want, from)) do
        local key = take(i, p[1], p[4] + 1)
        if key then
          call('ZREM', lane .. '#waits#' .. key, place_of(i, p[1]))
          if unhand(lane, key, i, p[1], '') then wake(retry) else call('SREM', lane .. '#keys', key) end
        end
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
      taken[#taken + 1] = {2, entry[1], 1, '0', '0', entry[2]}
    end
  end
end
for _, stream in ipairs(streams) do
  for _, from in ipairs({FREE, LANE, PARKED}) do
    if #call('XPENDING', stream, group, '-', '+', 1, from) > 0 then more = 1 end
  end
end
if more == 1 then ring(retry) end
return {1, soonest(), more, gone, taken}
""",
    lanes=True,
)

# A message is taken when no earlier one of its key waits, awaits its retry or is held by another. All else that is read
# joins its lane.
TAKE = script(
    "receive in order",
    _TEND
    + """
local STEPS = 1000  -- looks at messages per call, so that none holds up the server
local steps, woken, state, joined = 0, false, {}, {}
local function pending(which, id)
  steps = steps + 1
  local p = call('XPENDING', streams[which], group, id, id, 1)[1]
  return p, p and p[2]:sub(1, 10) == 'sluiceway:'
end
local function hand(key)  -- who holds messages of the key, and the place of the first
  local held = lane .. '#held#' .. key
  while true do
    local first = call('ZRANGE', held, 0, 0)[1]
    if not first then return end
    local p, waits = pending(entry_of(first))
    if p and not waits then return p[2], first end
    call('ZREM', held, first)
    if p then call('ZADD', lane .. '#waits#' .. key, 0, first) end
  end
end
local function visit(key)  -- take what may be taken of a lane; offer what is left to those who may
  local owner, first = hand(key)
  local waits, held = lane .. '#waits#' .. key, lane .. '#held#' .. key
  while true do
    local head = call('ZRANGE', waits, 0, 0)[1]
    if not head then return call('SREM', lane .. '#keys', key) end
    if steps > STEPS then return offer(lane, key, owner or '') end
    local which, id = entry_of(head)
    local p, still = pending(which, id)
    if p and still then
      if p[2] == LATER or (p[2] == PARKED and first and first < head) then return end
      if owner and owner ~= me then
        woken = true
        return offer(lane, key, owner)
      end
      if want <= 0 then return offer(lane, key, owner or '') end
      if take(which, id, p[4] + 1) then
        call('ZADD', held, 0, head)
        owner = me
      end
    end
    call('ZREM', waits, head)
  end
end
local function join(key, which, id, delivered)  -- to its lane
  call('XCLAIM', streams[which], group, LANE, 0, id, 'RETRYCOUNT', delivered, 'JUSTID')
  local place = place_of(which, id)
  call('ZREM', lane .. '#held#' .. key, place)
  call('ZADD', lane .. '#waits#' .. key, 0, place)
  call('ZADD', lane .. '#open#', place:sub(1, 20), key)
  call('SADD', lane .. '#keys', key)
end
local function arrived(which, id, fields)
  steps = steps + 1
  if fields[1] == 'bell' then return finish(streams[which], group, id, true) end
  local key, only = key_of(fields)
  if which == 1 and only and only ~= group then return finish(main, group, id) end
  if key then
    if state[key] == nil then
      local owner = hand(key)
      state[key] = (not owner or owner == me) and call('EXISTS', lane .. '#waits#' .. key) == 0
    end
    if not state[key] then
      joined[key] = true
      return join(key, which, id, 0)
    end
    call('ZADD', lane .. '#held#' .. key, 0, place_of(which, id))
  end
  taken[#taken + 1] = {which, id, 1, '0', '0', fields}
  want = want - 1
end
local function visit_all(open)
  while want > 0 and steps <= STEPS do
    local key = call('ZPOPMIN', open)[1]
    if not key then return end
    visit(key)
  end
end
if want > 0 then
  for i, stream in ipairs(streams) do
    for _, p in ipairs(call('XPENDING', stream, group, '-', '+', STEPS, FREE)) do
      if want > 0 and steps <= STEPS then
        steps = steps + 1
        local entry = call('XRANGE', stream, p[1], p[1])[1]
        local key = entry and (key_of(entry[2]))
        if key then join(key, i, p[1], p[4]) else take(i, p[1], p[4] + 1) end
      end
    end
  end
  if call('SET', lane .. '#seen', '1', 'NX', 'PX', lease) then
    call('ZUNIONSTORE', lane .. '#open#', 2, lane .. '#open#', lane .. '#keys', 'AGGREGATE', 'MIN')
  end
  visit_all(lane .. '#open#' .. me)
  visit_all(lane .. '#open#')
  for _, which in ipairs({2, 1}) do
    while want > 0 and steps <= STEPS do
      local stream = streams[which]
      local found = call('XREADGROUP', 'GROUP', group, me, 'COUNT', want, 'STREAMS', stream, '>')
      if not found then break end
      for _, entry in ipairs(found[1][2]) do arrived(which, entry[1], entry[2]) end
    end
  end
  for key in pairs(joined) do
    call('ZREM', lane .. '#open#', key)
    visit(key)
  end
end
local more = 0
for _, stream in ipairs(streams) do
  if #call('XPENDING', stream, group, '-', '+', 1, FREE) > 0 then more = 1 end
end
if call('EXISTS', lane .. '#open#', lane .. '#open#' .. me) > 0 or steps > STEPS then more = 1 end
if more == 1 then woken = true end
if woken or call('EXISTS', retry .. '#wake') == 0 then wake(retry) end
local behind = {}
if #taken == 0 then
  for i, stream in ipairs(streams) do
    for _, info in ipairs(call('XINFO', 'GROUPS', stream)) do
      if info[2] == group then behind[i] = info[8] end
    end
  end
  behind[3] = call('XREVRANGE', retry .. '#wake', '+', '-', 'COUNT', 1)[1][1]
end
return {1, soonest(), more, gone, taken, behind}
""",
    lanes=True,
)
