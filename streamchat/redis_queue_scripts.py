"""The Lua of queues, and of answers that end without their owner. Keys and rules: redis_lua.py. Does no I/O."""

from __future__ import annotations

from .redis_lua import ENDS, LETTERS, Script

# An answer that is claimed and not begun waits again. The first change needs no memory.
WAIT_AGAIN = """
local function wait_again(id, owner, claims)
  local row = call('HMGET', P .. 'answer:' .. id, 'queuekey', 'created', 'by', 'reserve')
  call('SMOVE', P .. 'live:' .. owner, P .. 'live:', id)
  call('SADD', P .. 'owners', '')
  call('ZADD', P .. 'queue:' .. row[1], row[2], id)
  call('HSET', P .. 'answer:' .. id, 'owner', '', 'claims', claims)
  call('HDEL', P .. 'answer:' .. id, 'claim')
  if row[3] ~= '' then call('HSET', P .. 'slots:' .. row[3], id, ' ' .. row[4]) end
end
"""

# owner, queue, how many, before, an id or '', attempt, then attempts to claim whose outcome this process never learned:
# what they got waits again. A full memory refuses a claim: what a model would say could not be written either.
# Returns 0 where the owner is dead, else rows.
CLAIM = Script(
    WAIT_AGAIN
    + """
local owner, queue, most, only = ARGV[1], P .. 'queue:' .. ARGV[2], ARGV[3], ARGV[5]
if not lives(owner) then return 0 end
if #ARGV > 6 then
  local lost = {}
  for i = 7, #ARGV do lost[ARGV[i]] = true end
  for _, id in ipairs(call('SMEMBERS', P .. 'live:' .. owner)) do
    local row = call('HMGET', P .. 'answer:' .. id, 'status', 'claim', 'claims')
    if row[1] == 'queued' and lost[row[2]] then wait_again(id, owner, row[3] - 1) end
  end
end
local ids
if only ~= '' then
  ids = call('ZSCORE', queue, only) and {only} or {}
else
  ids = call('ZRANGEBYSCORE', queue, '-inf', '(' .. ARGV[4], 'LIMIT', 0, most)
end
local rows = {}
for i, id in ipairs(ids) do
  local answer = P .. 'answer:' .. id
  local row = call('HMGET', answer, 'user', 'chat', 'model', 'created', 'reserve', 'queue', 'request', 'target',
                   'claims', 'by')
  call('HSET', answer, 'owner', owner, 'claims', row[9] + 1, 'claim', ARGV[6])
  call('ZREM', queue, id)
  call('SMOVE', P .. 'live:', P .. 'live:' .. owner, id)
  if row[10] ~= '' then call('HSET', P .. 'slots:' .. row[10], id, owner .. ' ' .. row[5]) end
  rows[i] = {id, unpack(row, 1, 8)}
end
return rows
"""
)

# owner, id. Returns -1 where the owner is dead, 0 where the answer is not its own to begin.
BEGIN = Script("""
local answer = P .. 'answer:' .. ARGV[2]
if not lives(ARGV[1]) then return -1 end
local row = call('HMGET', answer, 'owner', 'status')
if row[1] ~= ARGV[1] or row[2] ~= 'queued' then return 0 end
call('HDEL', answer, 'request', 'claim')
call('HSET', answer, 'status', 'in_progress')
return 1
""")

# id. Kept also in a set, for a listener that is not connected now; a full memory refuses the set, not the word. Returns
# 1 for one that is queued: it is to be ended by END.
CANCEL = Script("""
local row = call('HMGET', P .. 'answer:' .. ARGV[1], 'owner', 'status')
if row[2] == 'queued' then return 1 end
if row[1] and running(row[2]) and lives(row[1]) then
  if redis.pcall('SADD', P .. 'cancels:' .. row[1], ARGV[1]) ~= 0 then
    call('PUBLISH', P .. 'cancels:' .. row[1], ARGV[1])
  end
end
return 0
""")

# milliseconds to keep, owner, next, payload, id, status, told, day, tokens, record, and the letter behind the number of
# its values. `cancelled` is for one that is queued, any other status for one whose owner is dead. A full memory refuses
# to end one that was begun.
END = Script(
    ENDS
    + """
local keep, owner, next, payload, id, status = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local answer = P .. 'answer:' .. id
local row = call('HMGET', answer, 'owner', 'status', 'next', 'bytes', 'queuekey')
if status == 'cancelled' and row[2] ~= 'queued' then return 0 end
if status ~= 'cancelled' and (lives(owner) or row[1] ~= owner or not running(row[2])) then return 0 end
if row[3] ~= next then return 0 end
if row[2] == 'queued' then
  call('HDEL', answer, 'request', 'claim')
  call('ZREM', P .. 'queue:' .. row[5], id)
end
append(id, next, 1, payload)
call('HSET', answer, 'next', next + 1, 'bytes', row[4] + #payload)
settle(id, row[1], status, ARGV[7], ARGV[8], ARGV[9], ARGV[10], keep, (values(11)))
return 1
"""
)

# How often an answer is claimed. Ids of the answers of dead owners that are to be ended; others of theirs wait again,
# as their letters do. An owner that left none is forgotten.
DEAD = Script(
    LETTERS
    + WAIT_AGAIN
    + """
local found = {}
for _, owner in ipairs(call('SMEMBERS', P .. 'owners')) do
  if owner == '' then
    if call('SCARD', P .. 'live:') == 0 then call('SREM', P .. 'owners', '') end
  elseif not lives(owner) then
    hand_back_all(owner)
    local ids = call('SMEMBERS', P .. 'live:' .. owner)
    for _, id in ipairs(ids) do
      local row = call('HMGET', P .. 'answer:' .. id, 'status', 'claims')
      if not row[1] then
        call('SREM', P .. 'live:' .. owner, id)
      elseif row[1] == 'queued' and tonumber(row[2]) < tonumber(ARGV[1]) then
        wait_again(id, owner, row[2])
      else
        found[#found + 1] = id
      end
    end
    if #ids == 0 then
      call('SREM', P .. 'owners', owner)
      call('DEL', P .. 'cancels:' .. owner)
    end
  end
end
return found
"""
)
