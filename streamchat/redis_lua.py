"""What stands before the Lua that runs inside Redis, one script a change: it is done whole or not at all. Does no I/O.

Where memory is full Redis refuses a script's first command that needs some, and never a later one, nor one that comes
after a change that needs none. So that one comes before any other change; or, where a full memory must not hold up the
script, a change that needs none comes first. Keys, behind the prefix (KEYS[1]):

    owner:<owner>     lives as long as the lease          owners            those not yet reaped; '' with a queue
    answer:<id>       the row                             live:<owner>      ids of the answers that it runs
    events:<id>       the stream, and the channel         cancels:<owner>   ids it was told to stop, and the channel
    slots:<user>      id -> owner, reserve                spent:<day>:<user>  tokens
    chat:<chat>       its newest id                       key:<key>         id and fingerprint, for 24 h
    ended             ids by the time of their end        sizes             id -> bytes, user; of ended answers
    bytes             the sum of sizes                    attended          ids by when somebody read them
    ledger:<day>      the records                         days              those that have a ledger
    queue:<queue>     ids that nobody claimed, by age     live:             the same of all queues: nobody's answers
    letter:<letter>   the letter                          letters:<state>   ids by age
    due:<queue>       ids that nobody took, by due time   held:<owner>      letter -> attempt to take it
    target:<target>   ids of its waiting letters          off               targets that are switched off

<user>, <chat>, <key>, <queue> and <target> are hashes: they are strangers' text.
"""

from __future__ import annotations

import hashlib

# Stands before every script.
HEAD = """
local P = KEYS[1]
local call = redis.call
local known = {}
local function lives(owner)
  if known[owner] == nil then known[owner] = call('EXISTS', P .. 'owner:' .. owner) == 1 end
  return known[owner]
end
-- Those that hold slots: nobody's wait in a queue.
local function counts(owner) return owner == '' or lives(owner) end
-- What a dead owner claimed and did not begin will wait again.
local function holds(owner, id)
  return counts(owner) or call('HGET', P .. 'answer:' .. id, 'status') == 'queued'
end
local function now()
  local time = call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local function running(status) return status == 'in_progress' or status == 'queued' end
"""

# Stands before the scripts that change letters, too.
LETTERS = """
local function list(id, from, to, created, target)
  if from ~= to then
    if from ~= '' then call('ZREM', P .. 'letters:' .. from, id) end
    call('ZADD', P .. 'letters:' .. to, created, id)
  end
  call(to == 'waiting' and 'SADD' or 'SREM', P .. 'target:' .. target, id)
end
local function post(id, queue, target, created, due, off, ...)
  local letter, state = P .. 'letter:' .. id, 'waiting'
  if call('EXISTS', letter) == 1 then return end
  if call('SISMEMBER', P .. 'off', target) == 1 then state = 'dead' end
  call('HSET', letter, 'queuekey', queue, 'targetkey', target, 'created', created, 'due', due, 'attempts', 0,
       'state', state, 'told', state == 'dead' and off or '', ...)
  list(id, '', state, created, target)
  if state == 'waiting' then call('ZADD', P .. 'due:' .. queue, due, id) end
end
local function hand_back(owner, id)
  call('HDEL', P .. 'held:' .. owner, id)
  call('HDEL', P .. 'letter:' .. id, 'holder')
  local row = call('HMGET', P .. 'letter:' .. id, 'state', 'queuekey', 'due')
  if row[1] == 'waiting' then call('ZADD', P .. 'due:' .. row[2], row[3], id) end
end
local function hand_back_all(owner)
  for _, id in ipairs(call('HKEYS', P .. 'held:' .. owner)) do hand_back(owner, id) end
end
"""

# Stands before the scripts that end answers. `letter` holds the values of `post`.
ENDS = (
    LETTERS
    + """
local function append(id, last, count, payload)
  call('XADD', P .. 'events:' .. id, last .. '-' .. count, 'b', payload)
  call('PUBLISH', P .. 'events:' .. id, last .. ' ' .. count .. ' ' .. payload)
end
local function shrink(id, size)
  call('HDEL', P .. 'sizes', id)
  call('ZREM', P .. 'attended', id)
  call('DECRBY', P .. 'bytes', string.match(size, '^%d+'))
end
-- What is left of an answer that ended, and of those whose keys have expired since.
local function settle(id, owner, status, told, day, tokens, record, keep, letter)
  local answer = P .. 'answer:' .. id
  local row = call('HMGET', answer, 'by', 'bytes', 'chatkey')
  local at = now()
  call('XADD', P .. 'ledger:' .. day, '*', 'r', record)
  call('SADD', P .. 'days', day)
  call('HSET', answer, 'status', status, 'told', told)
  if row[1] ~= '' then
    call('HDEL', P .. 'slots:' .. row[1], id)
    call('INCRBY', P .. 'spent:' .. day .. ':' .. row[1], tokens)
    call('EXPIRE', P .. 'spent:' .. day .. ':' .. row[1], 259200)
  end
  call('SREM', P .. 'live:' .. owner, id)
  call('SREM', P .. 'cancels:' .. owner, id)
  call('ZADD', P .. 'ended', at, id)
  call('HSET', P .. 'sizes', id, row[2] .. ' ' .. row[1])
  call('INCRBY', P .. 'bytes', row[2])
  if tonumber(keep) > 0 then
    call('PEXPIRE', answer, keep)
    call('PEXPIRE', P .. 'events:' .. id, keep)
    if call('GET', P .. 'chat:' .. row[3]) == id then call('PEXPIRE', P .. 'chat:' .. row[3], keep) end
    for _, old in ipairs(call('ZRANGEBYSCORE', P .. 'ended', '-inf', at - keep / 1000 - 1, 'LIMIT', 0, 10)) do
      shrink(old, call('HGET', P .. 'sizes', old) or '0')
      call('ZREM', P .. 'ended', old)
    end
  end
  if letter then post(unpack(letter)) end
end
-- The values that come behind their number in ARGV; nil where there are none.
local function values(at)
  local count = tonumber(ARGV[at])
  return count > 0 and {unpack(ARGV, at + 1, at + count)} or nil, at + 1 + count
end
"""
)


# An answer that is not made after all.
TAKE_BACK = """
local function take_back(id)
  local answer = P .. 'answer:' .. id
  local row = call('HMGET', answer, 'by', 'key', 'chatkey', 'owner')
  call('SREM', P .. 'live:' .. row[4], id)
  call('SREM', P .. 'cancels:' .. row[4], id)
  call('HDEL', P .. 'slots:' .. row[1], id)
  if call('HGET', P .. 'key:' .. row[2], 'id') == id then call('DEL', P .. 'key:' .. row[2]) end
  if call('GET', P .. 'chat:' .. row[3]) == id then call('DEL', P .. 'chat:' .. row[3]) end
  call('DEL', answer)
end
"""


class Script:
    """A Lua script and the name that Redis gives it."""

    def __init__(self, body: str) -> None:
        self.text = HEAD + body
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
