"""What the scripts have in common, in Lua. Times are the server's, in milliseconds.

Keys of a group on a topic, in this order (see keys.py): the topic's stream, the retry stream, `due` (a sorted set of
what waits for its time: "1<id>" and "2<id>" for entries of the two streams that stay pending, "c<fields>" for copies),
`leases` (a sorted set of consumers), `counts` (a hash: suspicions by "1<id>", failures by "f1<id>"), `floor` (a
string), the topic's own `due`, and `lane`, with which the names of what keeps keys in order begin.

A lane is what the group knows of one ordering key: `lane#waits#<key>` and `lane#held#<key>`, sorted sets of places. A
place is an entry's id, written so that places sort as ids do. What is pending, and with whom, is the truth, and lanes
are its index: a place found in the wrong set goes to the right one, and once per lease all lanes in which something
waits (`lane#keys`, a set) are looked at, so that none stays shut for what another program did. `lane#open#` has the
keys of which somebody may take something, `lane#open#<consumer>` those of which only he may, since he holds some.
"""

from __future__ import annotations

import hashlib

from msgspec import Struct

FREE = "sluiceway:free"  # the consumer of what was handed back
LATER = "sluiceway:later"  # of what was handed back until it is due
LANE = "sluiceway:lane"  # of what waits behind an earlier message of its key
PARKED = "sluiceway:parked"  # and of what waits until none of them is in anyone's hand


class Script(Struct, frozen=True):
    """One script; `what` it does, for errors."""

    what: str
    text: str
    sha: str


def script(what: str, text: str, *, lanes: bool = False, adds: bool = False) -> Script:
    """A script with what it needs before it. But for one that only `adds`, it runs on a full server too: it is what
    consumers make room by."""
    text = ("" if adds else "#!lua flags=allow-oom\n") + _COMMON + (_LANES if lanes else "") + text
    return Script(what, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_COMMON = f"""
local call, FREE, LATER, LANE, PARKED = redis.call, '{FREE}', '{LATER}', '{LANE}', '{PARKED}'
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local function list(packed)
  local found, at = {{}}, 1
  while at <= #packed do found[#found + 1], at = struct.unpack('>I4c0', packed, at) end
  return found
end
local function wake(retry)  -- those that receive in order: the last one stays, so that nobody misses it
  call('XADD', retry .. '#wake', 'MAXLEN', 1, '*', 'bell', '1')
end
local function ring(retry)
  call('XADD', retry, '*', 'bell', '1')
  if call('EXISTS', retry .. '#wake') == 1 then wake(retry) end
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

_LANES = """
local function place_of(which, id)
  local ms, seq = id:match('(%d+)-(%d+)')
  return ('0'):rep(20 - #ms) .. ms .. '-' .. ('0'):rep(20 - #seq) .. seq .. ':' .. which
end
local function entry_of(place)
  local ms, seq, which = place:match('^0*(%d+)-0*(%d+):(%d)$')
  return tonumber(which), ms .. '-' .. seq
end
local function key_of(fields)  -- and the only group that it is for
  local key, ours, only
  for i = 1, #fields, 2 do
    if fields[i] == 'body' then ours = true end
    if fields[i] == 'sluiceway-key' then key = fields[i + 1] end
    if fields[i] == 'sluiceway-group' then only = fields[i + 1] end
  end
  if ours then return key, only end
end
local function offer(lane, key, consumer)
  local first = call('ZRANGE', lane .. '#waits#' .. key, 0, 0)[1]
  if first then call('ZADD', lane .. '#open#' .. consumer, first:sub(1, 20), key) end
  return first ~= nil
end
local function open_all(lane, consumer)  -- he is gone
  local from, to = lane .. '#open#' .. consumer, lane .. '#open#'
  if call('EXISTS', from) == 1 then
    call('ZUNIONSTORE', to, 2, to, from, 'AGGREGATE', 'MIN')
    call('DEL', from)
  end
end
local function unhand(lane, key, which, id, me)
  call('ZREM', lane .. '#held#' .. key, place_of(which, id))
  return offer(lane, key, call('EXISTS', lane .. '#held#' .. key) == 1 and me or '')
end
"""
