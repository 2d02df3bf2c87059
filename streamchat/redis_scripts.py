"""The Lua of leases and answers, and of what is asked of them. Keys and rules: redis_lua.py. Does no I/O."""

from __future__ import annotations

from .redis_lua import ENDS, TAKE_BACK, Script

# owner, milliseconds
TAKE_LEASE = Script("""
call('SADD', P .. 'owners', ARGV[1])
call('SET', P .. 'owner:' .. ARGV[1], '', 'PX', ARGV[2])
""")

# owner, milliseconds, then ids and attempts ('' is any) of admissions whose outcome this process never learned: none
# runs, but one that waits in a queue may have been claimed. That one is taken back although its owner is dead.
RENEW = Script(
    TAKE_BACK
    + """
local alive = call('PEXPIRE', P .. 'owner:' .. ARGV[1], ARGV[2])
for i = 3, #ARGV, 2 do
  local row = call('HMGET', P .. 'answer:' .. ARGV[i], 'attempt', 'next', 'owner', 'status', 'queuekey')
  local waits = row[3] == '' and row[4] == 'queued'
  if (ARGV[i + 1] == '' or row[1] == ARGV[i + 1]) and row[2] == '0' and (waits or alive == 1 and not row[5]) then
    if waits then call('ZREM', P .. 'queue:' .. row[5], ARGV[i]) end
    take_back(ARGV[i])
  end
end
return alive
"""
)

# owner, id, user, key, fingerprint, chat, reserve, attempt, the three limits, day, time, the queue of one that waits in
# one, then the row's other fields
ADMIT = Script("""
local owner, id, user, key, print, chat = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local reserve, attempt, day, created = tonumber(ARGV[7]), ARGV[8], ARGV[12], ARGV[13]
local queue, holder = ARGV[14], ARGV[14] == '' and ARGV[1] or ''
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
    if counts(each) then
      count = count + call('SCARD', P .. 'live:' .. each)
    else
      for _, left in ipairs(call('SMEMBERS', P .. 'live:' .. each)) do
        if holds(each, left) then count = count + 1 end
      end
    end
  end
  if count >= most then return {'streams'} end
end
if user ~= '' and (most_of_user > 0 or tokens > 0) then
  local count, used = 0, tonumber(call('GET', P .. 'spent:' .. day .. ':' .. user) or 0)
  local slots = call('HGETALL', P .. 'slots:' .. user)
  for i = 1, #slots, 2 do
    local of, held = string.match(slots[i + 1], '^(%S*) (%d+)$')
    if holds(of, slots[i]) then
      count = count + 1
      used = used + tonumber(held)
    end
  end
  if most_of_user > 0 and count >= most_of_user then return {'streams'} end
  if tokens > 0 and (used >= tokens or used + reserve > tokens) then return {'budget'} end
end
call('HSET', P .. 'answer:' .. id, 'owner', holder, 'next', 0, 'bytes', 0, 'reserve', reserve, 'attempt', attempt,
     'by', user, 'key', key, 'chatkey', chat, 'created', created, unpack(ARGV, 15))
call('SADD', P .. 'live:' .. holder, id)
if queue ~= '' then
  call('SADD', P .. 'owners', '')
  call('ZADD', P .. 'queue:' .. queue, created, id)
end
if user ~= '' then call('HSET', P .. 'slots:' .. user, id, holder .. ' ' .. reserve) end
if chat ~= '' then call('SET', P .. 'chat:' .. chat, id) end
if key ~= '' then
  call('HSET', P .. 'key:' .. key, 'id', id, 'fingerprint', print, 'created', created)
  call('EXPIRE', P .. 'key:' .. key, 86400)
end
return {'told', id}
""")

# owner, milliseconds to keep, how many batches; each id, last, count, payload; then endings, each id, status, told,
# day, tokens, record, and its letter behind the number of its values. Returns 0 where the owner is dead; nothing is
# written either where batches begin with events that are kept: their places and what is to come next of their answers
# is returned.
WRITE = Script(
    ENDS
    + TAKE_BACK
    + """
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
local i = 4 + batches * 4
while i <= #ARGV do
  local letter, next = values(i + 6)
  if own(ARGV[i]) and ARGV[i + 1] == 'retracted' then
    take_back(ARGV[i])
    rows[ARGV[i]] = false
  elseif own(ARGV[i]) then
    settle(ARGV[i], owner, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], keep, letter)
    rows[ARGV[i]] = false
  end
  i = next
end
return {}
"""
)

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
FORGET = Script(
    ENDS
    + """
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
"""
)

# live, queued, reserved, owners, answers, bytes, waiting, dead
GAUGES = Script("""
local live, queued, reserved, owners = 0, 0, 0, 0
local answers, bytes = call('ZCARD', P .. 'ended'), tonumber(call('GET', P .. 'bytes') or 0)
for _, owner in ipairs(call('SMEMBERS', P .. 'owners')) do
  if lives(owner) then owners = owners + 1 end
  for _, id in ipairs(call('SMEMBERS', P .. 'live:' .. owner)) do
    local row = call('HMGET', P .. 'answer:' .. id, 'reserve', 'bytes', 'status')
    answers, bytes = answers + 1, bytes + (row[2] or 0)
    if row[3] == 'queued' then queued = queued + 1 end
    if holds(owner, id) then live, reserved = live + 1, reserved + (row[1] or 0) end
  end
end
return {live, queued, reserved, owners, answers, bytes,
        call('ZCARD', P .. 'letters:waiting'), call('ZCARD', P .. 'letters:dead')}
""")
