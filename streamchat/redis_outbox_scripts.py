"""The Lua of letters on their way. Keys and rules: redis_lua.py. A full memory holds up none of it. Does no I/O."""

from __future__ import annotations

from .redis_lua import LETTERS, Script

FIELDS = ("answer", "queue", "target", "body", "created", "state", "attempts", "due", "told")
ROW = "'" + "', '".join(FIELDS) + "'"

# owner, queue, now, how many, attempt, then attempts to take whose outcome this process never learned. What they got,
# and what dead owners left behind, can be taken, too. Returns 0 where the owner is dead, else rows.
TAKE = Script(
    LETTERS
    + """
local owner, due = ARGV[1], P .. 'due:' .. ARGV[2]
if not lives(owner) then return 0 end
for _, each in ipairs(call('SMEMBERS', P .. 'owners')) do
  if not lives(each) then hand_back_all(each) end
end
if #ARGV > 5 then
  local lost = {}
  for i = 6, #ARGV do lost[ARGV[i]] = true end
  local held = call('HGETALL', P .. 'held:' .. owner)
  for i = 1, #held, 2 do
    if lost[held[i + 1]] then hand_back(owner, held[i]) end
  end
end
local rows = {}
for _, id in ipairs(call('ZRANGEBYSCORE', due, '-inf', ARGV[3], 'LIMIT', 0, ARGV[4])) do
  local row = call('HMGET', P .. 'letter:' .. id, """
    + ROW
    + """)
  call('ZREM', due, id)
  if row[1] then
    call('HSET', P .. 'letter:' .. id, 'holder', owner)
    call('HSET', P .. 'held:' .. owner, id, ARGV[5])
    rows[#rows + 1] = {id, unpack(row)}
  end
end
return rows
"""
)

# owner, id, state, due, told, what the letters of a target are told that is switched off now or '', milliseconds to
# keep. One whose target was switched off meanwhile stays dead, unless it was delivered.
SETTLE = Script(
    LETTERS
    + """
local owner, id, state, due, off, keep = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[6], tonumber(ARGV[7])
local letter = P .. 'letter:' .. id
local row = call('HMGET', letter, 'holder', 'state', 'created', 'queuekey', 'targetkey', 'attempts')
if row[1] ~= owner then return end
local created, queue, target = row[3], row[4], row[5]
call('HDEL', letter, 'holder')
call('HDEL', P .. 'held:' .. owner, id)
if row[2] == 'waiting' or state == 'delivered' then
  call('HSET', letter, 'state', state, 'attempts', row[6] + 1, 'due', due, 'told', ARGV[5])
  list(id, row[2], state, created, target)
  if state == 'waiting' then
    call('ZADD', P .. 'due:' .. queue, due, id)
  elseif state == 'delivered' and keep > 0 then
    call('PEXPIREAT', letter, math.floor(created * 1000 + keep))
    call('ZREMRANGEBYSCORE', P .. 'letters:delivered', '-inf', now() - keep / 1000 - 1)
  end
end
if off ~= '' then
  call('SADD', P .. 'off', target)
  for _, each in ipairs(call('SMEMBERS', P .. 'target:' .. target)) do
    local of = call('HMGET', P .. 'letter:' .. each, 'created', 'queuekey')
    call('HSET', P .. 'letter:' .. each, 'state', 'dead', 'due', 0, 'told', off)
    call('ZREM', P .. 'due:' .. of[2], each)
    list(each, 'waiting', 'dead', of[1], target)
  end
end
"""
)

# how many, then states. Rows, the newest first.
LIST = Script(
    """
local most, found, rows = tonumber(ARGV[1]), {}, {}
for i = 2, #ARGV do
  local told = call('ZREVRANGE', P .. 'letters:' .. ARGV[i], 0, most - 1, 'WITHSCORES')
  for j = 1, #told, 2 do found[#found + 1] = {told[j], tonumber(told[j + 1])} end
end
table.sort(found, function(one, other) return one[2] > other[2] end)
for _, each in ipairs(found) do
  if #rows >= most then break end
  local row = call('HMGET', P .. 'letter:' .. each[1], """
    + ROW
    + """)
  if row[1] then rows[#rows + 1] = {each[1], unpack(row)} end
end
return rows
"""
)

# id, now
REPLAY = Script(
    LETTERS
    + """
local id, due, letter = ARGV[1], ARGV[2], P .. 'letter:' .. ARGV[1]
local row = call('HMGET', letter, 'holder', 'state', 'created', 'queuekey', 'targetkey')
if not row[2] then return 0 end
call('SREM', P .. 'off', row[5])
if row[1] then call('HDEL', P .. 'held:' .. row[1], id) end
call('HDEL', letter, 'holder')
call('PERSIST', letter)
call('HSET', letter, 'state', 'waiting', 'attempts', 0, 'due', due, 'told', '')
list(id, row[2], 'waiting', row[3], row[5])
call('ZADD', P .. 'due:' .. row[4], due, id)
return 1
"""
)

# seconds, how many. The delivered ones that are older.
FORGET = Script("""
local ids = call('ZRANGEBYSCORE', P .. 'letters:delivered', '-inf', '(' .. now() - ARGV[1], 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  call('ZREM', P .. 'letters:delivered', id)
  call('UNLINK', P .. 'letter:' .. id)
end
return #ids
""")
