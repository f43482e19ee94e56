-- KEYS: job, work, answers, done, workers (see job in job.go). ARGV[1] is the job's id.
if redis.call('HGET', KEYS[1], 'id') ~= ARGV[1] or redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4]) ~= 3 then
  return redis.error_reply('JOBLOST the job is gone')
end
local function field(name) return tonumber(redis.call('HGET', KEYS[1], name)) end
local function millis()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
-- owned reports whether a span is this consumer's.
local function owned(consumer, id)
  return #redis.call('XPENDING', KEYS[2], 'workers', id, id, 1, consumer) > 0
end

---- join
-- ARGV: (none), id, input, window, how long the job is kept. Begins the job if there is none.
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[2], KEYS[3], KEYS[4], KEYS[5])
  redis.call('HSET', KEYS[1], 'id', ARGV[2], 'input', ARGV[3], 'window', ARGV[4], 'planned', 0,
    'count', 0, 'bytes', 0, 'dropped', 0, 'dropped_bytes', 0, 'begun', redis.call('TIME')[1])
  redis.call('XGROUP', 'CREATE', KEYS[2], 'workers', '0', 'MKSTREAM')
  -- An empty stream and an empty bitmap, so that a key that is gone was lost.
  redis.call('XGROUP', 'CREATE', KEYS[3], 'none', '0', 'MKSTREAM')
  redis.call('SETBIT', KEYS[4], 0, 0)
  for i = 1, 4 do redis.call('PEXPIRE', KEYS[i], ARGV[5]) end
end
return redis.call('HMGET', KEYS[1], 'id', 'input', 'window', 'planned', 'count', 'dropped')

---- plan
-- ARGV: id, the window's number, the item before which all must be answered, spans.
local planned = field('planned')
if planned ~= tonumber(ARGV[2]) then return {planned} end
local undone = redis.call('BITPOS', KEYS[4], 0)
if undone >= 0 and undone < tonumber(ARGV[3]) then return {planned} end
for i = 4, #ARGV do redis.call('XADD', KEYS[2], '*', 'span', ARGV[i]) end
return {redis.call('HINCRBY', KEYS[1], 'planned', 1)}

---- put
-- ARGV: id, index, answer, the most bytes, milliseconds of silence after which a worker is gone.
if redis.call('GETBIT', KEYS[4], ARGV[2]) == 1 then return 0 end
local size, most = #ARGV[3], tonumber(ARGV[4])
local held = field('bytes') - field('dropped_bytes')
if held > 0 and held + size > most then
  -- What all workers that are there have taken, at least one of them for an output, can be dropped.
  local now, least, output = millis(), nil, false
  local workers = redis.call('HGETALL', KEYS[5])
  for i = 2, #workers, 2 do
    local at, taken, writes = string.match(workers[i], '^(%d+) (%d+) ([01])$')
    if at and now - at < tonumber(ARGV[5]) then
      taken = tonumber(taken)
      if not least or taken < least then least = taken end
      if writes == '1' then output = true end
    end
  end
  if output and least > field('dropped') then
    local last = redis.call('XRANGE', KEYS[3], least .. '-0', least .. '-0')[1]
    if last then
      redis.call('XTRIM', KEYS[3], 'MINID', (least + 1) .. '-0')
      redis.call('HSET', KEYS[1], 'dropped', least, 'dropped_bytes', last[2][4])
      held = field('bytes') - field('dropped_bytes')
    end
  end
  if held > 0 and held + size > most then return redis.error_reply('JOBFULL the answers fill their bytes') end
end
redis.call('SETBIT', KEYS[4], ARGV[2], 1)
local n = redis.call('HINCRBY', KEYS[1], 'count', 1)
local bytes = redis.call('HINCRBY', KEYS[1], 'bytes', size)
redis.call('XADD', KEYS[3], n .. '-0', 'answer', ARGV[3], 'bytes', bytes)
return n

---- ack
-- ARGV: id, span.
redis.call('XACK', KEYS[2], 'workers', ARGV[2])
return redis.call('XDEL', KEYS[2], ARGV[2])

---- beat
-- ARGV: id, consumer, answers taken, whether it writes an output, whether to renew the spans, items
-- of the input, silence, how long the job is kept, and after its end; spans.
local count = field('count')
local kept = ARGV[8]
if count >= tonumber(ARGV[6]) then kept = ARGV[9] end
-- This comes first: a server that is full refuses only what a script does before its first change.
for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], kept) end
local lost = {}
for i = 10, #ARGV do
  if not owned(ARGV[2], ARGV[i]) then
    lost[#lost + 1] = i - 9
  elseif ARGV[5] == '1' then
    redis.call('XCLAIM', KEYS[2], 'workers', ARGV[2], 0, ARGV[i], 'JUSTID')
  end
end
local now, there = millis(), 0
redis.call('HSET', KEYS[5], ARGV[2], string.format('%.0f %s %s', now, ARGV[3], ARGV[4]))
redis.call('PEXPIRE', KEYS[5], kept)
local workers = redis.call('HGETALL', KEYS[5])
for i = 2, #workers, 2 do
  local at = string.match(workers[i], '^(%d+) ')
  if at and now - at < tonumber(ARGV[7]) then there = there + 1 end
end
return {count, there, field('bytes') - field('dropped_bytes'), unpack(lost)}

---- leave
-- ARGV: id, consumer, items of the input or 0, how long the job is kept after its end, spans. These
-- are as if they had been idle for a day, so that others claim them.
for i = 5, #ARGV do
  if owned(ARGV[2], ARGV[i]) then
    redis.call('XCLAIM', KEYS[2], 'workers', ARGV[2], 0, ARGV[i], 'IDLE', 86400000, 'JUSTID')
  end
end
redis.call('HDEL', KEYS[5], ARGV[2])
if ARGV[3] ~= '0' and field('count') >= tonumber(ARGV[3]) then
  for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[4]) end
end
return 0

---- undone
-- ARGV: id, indexes. Returns 0 for each that is not answered, 1 for each that is.
local bits = {}
for i = 2, #ARGV do bits[#bits + 1] = redis.call('GETBIT', KEYS[4], ARGV[i]) end
return bits
