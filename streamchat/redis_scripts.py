"""The Lua that runs inside Redis, one script a change: it is done whole or not at all. Does no I/O.

Where memory is full Redis refuses a script's first command that needs some, and never a later one: so that one comes
before any other change. Keys, behind the prefix (KEYS[1]):

    owner:<owner>     lives as long as the lease          owners            those not yet reaped
    answer:<id>       the row                             live:<owner>      ids of the answers that it runs
    events:<id>       the stream, and the channel         cancels:<owner>   ids it was told to stop, and the channel
    slots:<user>      id -> owner, reserve                spent:<day>:<user>  tokens
    chat:<chat>       its newest id                       key:<key>         id and fingerprint, for 24 h
    ended             ids by the time of their end        sizes             id -> bytes, user; of ended answers
    bytes             the sum of sizes                    attended          ids by when somebody read them
    ledger:<day>      the records                         days              those that have a ledger

<user>, <chat> and <key> are hashes: they are strangers' text.
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
local function now()
  local time = call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local function running(status) return status == 'in_progress' or status == 'queued' end
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
local function settle(id, owner, status, told, day, tokens, record, keep)
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
end
"""


class Script:
    """A Lua script and the name that Redis gives it."""

    def __init__(self, body: str) -> None:
        self.text = HEAD + body
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


# owner, milliseconds
TAKE_LEASE = Script("""
call('SADD', P .. 'owners', ARGV[1])
call('SET', P .. 'owner:' .. ARGV[1], '', 'PX', ARGV[2])
""")

# owner, milliseconds, then ids and attempts of admissions whose outcome this process never learned: none of them runs.
RENEW = Script("""
if call('PEXPIRE', P .. 'owner:' .. ARGV[1], ARGV[2]) == 0 then return 0 end
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  local row = call('HMGET', P .. 'answer:' .. id, 'attempt', 'next', 'by', 'key', 'chatkey')
  if row[1] == ARGV[i + 1] and row[2] == '0' then
    call('SREM', P .. 'live:' .. ARGV[1], id)
    call('HDEL', P .. 'slots:' .. row[3], id)
    if call('HGET', P .. 'key:' .. row[4], 'id') == id then call('DEL', P .. 'key:' .. row[4]) end
    if call('GET', P .. 'chat:' .. row[5]) == id then call('DEL', P .. 'chat:' .. row[5]) end
    call('DEL', P .. 'answer:' .. id)
  end
end
return 1
""")

# owner, id, user, key, fingerprint, chat, reserve, attempt, the three limits, day, time, then the row's other fields
ADMIT = Script("""
local owner, id, user, key, print, chat = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local reserve, attempt, day, created = tonumber(ARGV[7]), ARGV[8], ARGV[12], ARGV[13]
local most_of_user, most, tokens = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
if not lives(owner) then return {'lost'} end
if key ~= '' then
  local told = call('HMGET', P .. 'key:' .. key, 'id', 'fingerprint', 'created')
  if told[1] and tonumber(told[3]) > tonumber(created) - 86400 then
    if told[2] ~= print then return {'mismatch'} end
    if told[1] ~= id then return {'told', told[1]} end
  end
end
if call('EXISTS', P .. 'answer:' .. id) == 1 then
  call('HSET', P .. 'answer:' .. id, 'attempt', attempt)
  return {'told', id}
end
if most > 0 then
  local count = 0
  for _, each in ipairs(call('SMEMBERS', P .. 'owners')) do
    if lives(each) then count = count + call('SCARD', P .. 'live:' .. each) end
  end
  if count >= most then return {'streams'} end
end
if user ~= '' and (most_of_user > 0 or tokens > 0) then
  local count, used = 0, tonumber(call('GET', P .. 'spent:' .. day .. ':' .. user) or 0)
  for _, slot in ipairs(call('HVALS', P .. 'slots:' .. user)) do
    local holder, held = string.match(slot, '^(%S+) (%d+)$')
    if lives(holder) then
      count = count + 1
      used = used + tonumber(held)
    end
  end
  if most_of_user > 0 and count >= most_of_user then return {'streams'} end
  if tokens > 0 and (used >= tokens or used + reserve > tokens) then return {'budget'} end
end
call('HSET', P .. 'answer:' .. id, 'owner', owner, 'next', 0, 'bytes', 0, 'reserve', reserve, 'attempt', attempt,
     'by', user, 'key', key, 'chatkey', chat, 'created', created, unpack(ARGV, 14))
call('SADD', P .. 'live:' .. owner, id)
if user ~= '' then call('HSET', P .. 'slots:' .. user, id, owner .. ' ' .. reserve) end
if chat ~= '' then call('SET', P .. 'chat:' .. chat, id) end
if key ~= '' then
  call('HSET', P .. 'key:' .. key, 'id', id, 'fingerprint', print, 'created', created)
  call('EXPIRE', P .. 'key:' .. key, 86400)
end
return {'told', id}
""")

# owner, milliseconds to keep, how many batches; each id, last, count, payload; then endings, each id, status, told,
# day, tokens, record. Returns 0 where the owner is dead; nothing is written either where batches begin with events that
# are kept: their places and what is to come next of their answers is returned.
WRITE = Script("""
local owner, keep, batches = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not lives(owner) then return 0 end
local rows = {}
local function own(id)
  if rows[id] == nil then
    local row = call('HMGET', P .. 'answer:' .. id, 'owner', 'status', 'next', 'bytes')
    rows[id] = row[1] == owner and running(row[2]) and {next = tonumber(row[3]), bytes = tonumber(row[4])}
  end
  return rows[id]
end
local new, overlaps = {}, {}
for i = 4, 3 + batches * 4, 4 do
  local row, last, count = own(ARGV[i]), tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  if row and last >= row.next then
    if last - count + 1 < row.next then
      overlaps[#overlaps + 1] = (i - 4) / 4
      overlaps[#overlaps + 1] = row.next
    end
    new[#new + 1] = i
    row.next, row.bytes, row.changed = last + 1, row.bytes + #ARGV[i + 3], true
  end
end
if #overlaps > 0 then return overlaps end
for _, i in ipairs(new) do append(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]) end
for id, row in pairs(rows) do
  if row and row.changed then call('HSET', P .. 'answer:' .. id, 'next', row.next, 'bytes', row.bytes) end
end
for i = 4 + batches * 4, #ARGV, 6 do
  if own(ARGV[i]) then
    settle(ARGV[i], owner, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], keep)
    rows[ARGV[i]] = false
  end
end
return {}
""")

# id, owner, next, payload, told, day, tokens, record, milliseconds to keep
BURY = Script("""
local id, owner, next = ARGV[1], ARGV[2], ARGV[3]
local row = call('HMGET', P .. 'answer:' .. id, 'owner', 'status', 'next', 'bytes')
if lives(owner) or row[1] ~= owner or not running(row[2]) or row[3] ~= next then return 0 end
append(id, next, 1, ARGV[4])
call('HSET', P .. 'answer:' .. id, 'next', next + 1, 'bytes', row[4] + #ARGV[4])
settle(id, owner, 'failed', ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9])
return 1
""")

# Ids of the answers of dead owners. An owner that left none is forgotten.
DEAD = Script("""
local found = {}
for _, owner in ipairs(call('SMEMBERS', P .. 'owners')) do
  if not lives(owner) then
    local ids = call('SMEMBERS', P .. 'live:' .. owner)
    for _, id in ipairs(ids) do
      if call('EXISTS', P .. 'answer:' .. id) == 1 then
        found[#found + 1] = id
      else
        call('SREM', P .. 'live:' .. owner, id)
      end
    end
    if #ids == 0 then
      call('SREM', P .. 'owners', owner)
      call('DEL', P .. 'cancels:' .. owner)
    end
  end
end
return found
""")

# id, after. One text, since the client's parser takes its time for each value: a line of last, count and length of
# every batch, then all payloads.
READ = Script("""
local sizes, payloads = {}, {}
for i, entry in ipairs(call('XRANGE', P .. 'events:' .. ARGV[1], ARGV[2], '+')) do
  payloads[i] = entry[2][2]
  sizes[i] = string.gsub(entry[1], '-', ' ') .. ' ' .. #payloads[i]
end
return table.concat(sizes, ' ') .. '\\n' .. table.concat(payloads)
""")

# id. Kept also in a set, for a listener that is not connected now; a full memory refuses the set, not the word.
CANCEL = Script("""
local row = call('HMGET', P .. 'answer:' .. ARGV[1], 'owner', 'status')
if row[1] and running(row[2]) and lives(row[1]) then
  if redis.pcall('SADD', P .. 'cancels:' .. row[1], ARGV[1]) ~= 0 then
    call('PUBLISH', P .. 'cancels:' .. row[1], ARGV[1])
  end
end
""")

# ids. Those of two days ago are of no interest: no answer runs so long.
ATTEND = Script("""
local at = now()
for _, id in ipairs(ARGV) do
  if call('EXISTS', P .. 'answer:' .. id) == 1 then call('ZADD', P .. 'attended', at, id) end
end
call('ZREMRANGEBYSCORE', P .. 'attended', '-inf', at - 172800)
""")

# id. Microseconds.
UNATTENDED = Script("""
local at = call('ZSCORE', P .. 'attended', ARGV[1])
return at and math.max(0, math.floor((now() - tonumber(at)) * 1000000))
""")

# seconds, 1 where the others are wanted too. How many ended longer ago, then ids, the oldest first.
ENDED = Script("""
local before = call('ZCOUNT', P .. 'ended', '-inf', '(' .. now() - ARGV[1])
if ARGV[2] == '1' then return {before, call('ZRANGE', P .. 'ended', 0, -1)} end
return {before, before > 0 and call('ZRANGE', P .. 'ended', 0, before - 1) or {}}
""")

# ids
FORGET = Script("""
local count = 0
for _, id in ipairs(ARGV) do
  if call('ZREM', P .. 'ended', id) == 1 then
    count = count + 1
    local chat = call('HGET', P .. 'answer:' .. id, 'chatkey') or ''
    if call('GET', P .. 'chat:' .. chat) == id then call('DEL', P .. 'chat:' .. chat) end
    shrink(id, call('HGET', P .. 'sizes', id) or '0')
    call('UNLINK', P .. 'answer:' .. id, P .. 'events:' .. id)
  end
end
return count
""")

# live, reserved, owners, answers, bytes
GAUGES = Script("""
local live, reserved, owners = 0, 0, 0
local answers, bytes = call('ZCARD', P .. 'ended'), tonumber(call('GET', P .. 'bytes') or 0)
for _, owner in ipairs(call('SMEMBERS', P .. 'owners')) do
  if lives(owner) then owners = owners + 1 end
  for _, id in ipairs(call('SMEMBERS', P .. 'live:' .. owner)) do
    local row = call('HMGET', P .. 'answer:' .. id, 'reserve', 'bytes')
    answers, bytes = answers + 1, bytes + (row[2] or 0)
    if lives(owner) then live, reserved = live + 1, reserved + (row[1] or 0) end
  end
end
return {live, reserved, owners, answers, bytes}
""")
