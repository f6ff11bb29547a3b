-- One step of a call, or one affair of the site, at once: Redis runs nothing else meanwhile.
--
-- KEYS[1] is what the keys begin with. It ends with a hash tag, so that all that a step touches is on one slot.
-- ARGV[1] is the operation, ARGV[2] its arguments in msgpack, and so is the reply. Times are in ms, by the server's clock
-- unless an operation's first argument is another time (in tests). kalium/controller/redis_calls.py is the other half.
--
-- Each operation writes first what needs memory, so that a Redis that has none refuses all of it or nothing.
--
-- Of an app:
--   cfg:SHA256           hash: its app CFG, a field for each question that a step asks
--   call:ID              hash: version and sha (what it began with), n (live invocations), t (pending tokens),
--                        i:INVOCATION and e:CALLER:EDGE (packed, see below)
--   token:TOKEN          packed, see below
--   instance:NODE ID     hash: owner (the controller that speaks for it), speaker (run and connection of its agent), n (live
--                        invocations), l:CALL:INVOCATION
--   starts:, ended:NODE ID  hashes: answers to its last starts, and to the last ends that somebody waits for
--   live, tokens, calls  sorted sets by deadline of CALL:INVOCATION and TOKEN:CALL, and a set of ids
--   caused:NODE ID       how many pending tokens the instance was granted; it outlives the instance, as they do
-- Of the site:
--   server               the run of Redis that the data belongs to
--   instance:ID          node, app and function that the id belongs to
--   agent:NODE           run of the agent that is connected, and the controller that hears it
--   controllers          sorted set of names, by when they were here last
--   policies, envelopes  hashes by app: the newest version, and its signed bytes
--
-- `sweep` removes what is over to the millisecond. Each key has a longer life than anything in it (`keep`), so that nothing stays
-- where nobody sweeps.

local base = KEYS[1]
local call = redis.call
local pack, unpacked = cmsgpack.pack, cmsgpack.unpack

-- An invocation. OPEN: flat list of (group of a join, edges of it without an answer). CALLER: invocation and number of the edge that
-- it was started by, if that has a future: a join, a callback or retries. LAST: the edge that was granted last. EDGES: how many were.
-- ASKED: its last step, the question and the answer.
local INSTANCE, FUNCTION, DEADLINE, STATES, OPEN, CALLER, LAST, EDGES, ASKED = 1, 2, 3, 4, 5, 6, 7, 8, 9
-- The last edge: what was invoked, retries left, its tokens, its number, and its group.
local KEY, LEFT, TOKEN, CALLBACK, NUMBER, JOIN = 1, 2, 3, 4, 5, 6
-- An edge with a join or a callback: its group, its invocation that counts, how many of them live, what has become of it, and how
-- many of its tokens are pending.
local GROUP, NEWEST, LIVE, IS_ANSWERED, IS_CALLED_BACK, PENDING = 1, 2, 3, 4, 5, 6
-- A token: the call, the function, the edge (invocation and number) that it was granted by, the deadline; `has_future` as above,
-- whether somebody waits for the end of what it starts; of a callback the token of its edge; and the instance that it was granted.
local CALL, CALLEE, BY, EDGE, UNTIL, HAS_FUTURE, HOLD, OF, CAUSER = 1, 2, 3, 4, 5, 6, 7, 8, 9

local function clock(given)
  if given > 0 then return given end
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The last `most` answers of one kind are in a hash: STEP is the question and its answer, k counts them, rN is the step in place N.
local function remembered(key, step, question)
  local found = call('HGET', key, step)
  if not found then return nil end
  found = unpacked(found)
  return found[1] == question and found[2] or {'no', 'malformed'}
end

local function remember(key, step, question, answer, most, keep)
  local place = 'r' .. (call('HINCRBY', key, 'k', 1) % most)
  local oldest = call('HGET', key, place)
  if oldest then call('HDEL', key, oldest) end
  call('HSET', key, place, step, step, pack({question, answer}))
  call('PEXPIRE', key, keep)
end

local function get(key, field)
  local packed = call('HGET', key, field)
  return packed and unpacked(packed) or nil
end

local function put(key, field, value)
  call('HSET', key, field, pack(value))
end

local function edge_field(invocation, number)
  return 'e:' .. invocation .. ':' .. number
end

-- Nothing asks for such an edge any more, unless it is the last one of its invocation: that may be taken again.
local function is_over(edge)
  return edge[LIVE] == 0 and edge[PENDING] == 0
end

-- Keeps an edge of `caller`, the invocation that took it (nil when that has ended), as long as something may ask for it.
local function keep_edge(key, field, edge, number, caller)
  if is_over(edge) and not (caller and caller[LAST][NUMBER] == number) then
    call('HDEL', key, field)
  else
    put(key, field, edge)
  end
end

-- How many edges of a group wait for an answer; `list` is OPEN of an invocation.
local function add_open(list, group, by)
  for i = 1, #list, 2 do
    if list[i] == group then
      list[i + 1] = list[i + 1] + by
      if list[i + 1] == 0 then
        for _ = 1, 2 do table.remove(list, i) end
      end
      return
    end
  end
  list[#list + 1], list[#list + 2] = group, by
end

-- `held` is a flat list of (version, sha) of the policies that the asking controller holds.
local function sha_of(held, version)
  for i = 1, #held, 2 do
    if held[i] == version then return held[i + 1] end
  end
end

local function may_step(held, version, call_version, call_sha)
  return sha_of(held, version) ~= nil and sha_of(held, tonumber(call_version)) == call_sha
end

local function end_if_idle(id)
  local key = base .. 'call:' .. id
  local found = call('HMGET', key, 'n', 't')
  if found[1] == '0' and found[2] == '0' then
    call('DEL', key)
    call('SREM', base .. 'calls', id)
  end
end

-- One token less of the edge that a token was granted by.
local function release_edge(token)
  local key, field = base .. 'call:' .. token[CALL], edge_field(token[BY], token[EDGE])
  local edge = (token[HOLD] or token[OF] ~= '') and get(key, field)
  if edge then
    edge[PENDING] = edge[PENDING] - 1
    keep_edge(key, field, edge, token[EDGE], get(key, 'i:' .. token[BY]))
  end
end

local function drop_token(token, id)
  call('ZREM', base .. 'tokens', token .. ':' .. id)
  local packed = call('GET', base .. 'token:' .. token)
  if packed then
    call('DEL', base .. 'token:' .. token)
    call('HINCRBY', base .. 'call:' .. id, 't', -1)
    local caused = base .. 'caused:' .. unpacked(packed)[CAUSER]
    if call('DECR', caused) <= 0 then call('DEL', caused) end
    release_edge(unpacked(packed))
  end
end

local function put_token(text, token, keep)
  call('SET', base .. 'token:' .. text, pack(token), 'PX', keep)
  call('ZADD', base .. 'tokens', token[UNTIL], text .. ':' .. token[CALL])
  call('HINCRBY', base .. 'call:' .. token[CALL], 't', 1)
  call('INCR', base .. 'caused:' .. token[CAUSER])
  call('PEXPIRE', base .. 'caused:' .. token[CAUSER], keep)
end

-- Starts

local function begin(id, invocation, instance, f, sha, caller, hold, now, keep)
  local start = call('HGET', base .. 'cfg:' .. sha, f)
  if not start then return {'cfg', sha} end
  start = unpacked(start)
  local key, deadline = base .. 'call:' .. id, now + start[1]
  call('HSET', key, 'i:' .. invocation, pack({instance, f, deadline, start[2], {}, caller, {}, 0, {}}))
  call('HINCRBY', key, 'n', 1)
  call('PEXPIRE', key, keep)
  call('PEXPIRE', base .. 'cfg:' .. sha, keep)
  call('ZADD', base .. 'live', deadline, id .. ':' .. invocation)
  local mine = base .. 'instance:' .. instance
  call('HSET', mine, 'l:' .. id .. ':' .. invocation, '')
  call('HINCRBY', mine, 'n', 1)
  return {'started', id, invocation, hold}
end

local function begin_call(a, now)
  local _, _, _, _, _, _, _, keep, most_invocations, f, refusal, version, sha, most_calls, id, invocation = unpack(a)
  if refusal ~= '' then return {'no', refusal} end
  if call('SCARD', base .. 'calls') >= most_calls then return {'full', 'live calls', most_calls} end
  if call('ZCARD', base .. 'live') >= most_invocations then return {'full', 'live invocations', most_invocations} end
  if call('HEXISTS', base .. 'cfg:' .. sha, f) == 0 then return {'cfg', sha} end
  call('HSET', base .. 'call:' .. id, 'version', version, 'sha', sha, 'n', 0, 't', 0)
  call('SADD', base .. 'calls', id)
  return begin(id, invocation, a[2], f, sha, {}, false, now, keep)
end

local function begin_in_call(a, now)
  local _, _, _, _, _, _, _, keep, most_invocations, f, version, held, most, text, invocation = unpack(a)
  local packed = call('GET', base .. 'token:' .. text)
  local token = packed and unpacked(packed)
  if not token or token[CALLEE] ~= f or now >= token[UNTIL] then return {'no', 'bad_token'} end
  local id = token[CALL]
  local key, field = base .. 'call:' .. id, edge_field(token[BY], token[EDGE])
  local found = call('HMGET', key, 'version', 'sha', 'n', field)
  local edge = found[4] and unpacked(found[4])
  if not found[1] then return {'no', 'bad_token'} end
  if token[OF] ~= '' and edge and edge[LIVE] > 0 then return {'no', 'bad_token', 'early'} end
  if not may_step(held, version, found[1], found[2]) then return {'no', 'policy_mismatch'} end
  if tonumber(found[3]) >= most then return {'full', 'invocations of one call', most} end
  if call('ZCARD', base .. 'live') >= most_invocations then return {'full', 'live invocations', most_invocations} end
  local caller = token[HAS_FUTURE] and {token[BY], token[EDGE]} or {}
  local answer = begin(id, invocation, a[2], f, found[2], caller, token[HOLD], now, keep)
  if answer[1] == 'cfg' then return answer end
  if token[OF] ~= '' then
    if edge then
      edge[IS_CALLED_BACK] = true
      put(key, field, edge)
    end
    drop_token(token[OF], id)  -- a start that has not come yet would be behind its own result
  elseif edge then
    edge[NEWEST], edge[LIVE] = invocation, edge[LIVE] + 1
    put(key, field, edge)
  end
  drop_token(text, id)
  return answer
end

-- A start is answered by `decide` unless its step was answered before.
local function start(a, decide)
  local given, instance, speaker, step, question, most_live, most_starts, keep = unpack(a)
  local found = call('HMGET', base .. 'instance:' .. instance, 'speaker', 'n')
  if found[1] ~= speaker then return {'late'} end
  local asked = base .. 'starts:' .. instance
  local answer = remembered(asked, step, question)
  if answer then return answer end
  local live = found[2]
  if live and tonumber(live) >= most_live then return {'full', 'live invocations of one instance', most_live} end
  answer = decide(a, clock(given))
  if answer[1] ~= 'full' and answer[1] ~= 'cfg' then
    remember(asked, step, question, answer, most_starts, keep)
    call('PEXPIRE', base .. 'instance:' .. instance, keep)
  end
  return answer
end

-- Invokes

-- What the app CFG says: the lowest label that has `key` at `states` or behind barriers that are passed, its retries and group,
-- and the states behind it. Nothing: there is none. False: the CFG is not here.
local function edge_of(sha, f, states, key, open)
  local is_open = {}
  for i = 1, #open, 2 do is_open[open[i]] = true end
  local seen, reached, waiting = {}, {}, {}
  local label, retries, group
  for i, state in ipairs(states) do
    waiting[i], seen[state] = state, true
  end
  local at = 1
  while at <= #waiting do
    local fields = {f}
    local to = math.min(#waiting, at + 499)  -- what fits Lua's stack
    for i = at, to do
      fields[#fields + 1] = f .. '\0' .. waiting[i] .. '\0' .. key
      fields[#fields + 1] = f .. '\0' .. waiting[i]
    end
    at = to + 1
    local rows = call('HMGET', base .. 'cfg:' .. sha, unpack(fields))
    if not rows[1] then return false end
    for i = 2, #fields, 2 do
      if rows[i] then
        local row = unpacked(rows[i])
        if not label or row[1] < label then
          label, retries, group, reached = row[1], row[2], row[3], {}
        end
        if row[1] == label then
          for _, target in ipairs(row[4]) do reached[target] = true end
        end
      end
      if rows[i + 1] then
        local barriers = unpacked(rows[i + 1])
        for j = 1, #barriers, 2 do
          local target = barriers[j + 1]
          if not is_open[barriers[j]] and not seen[target] then
            seen[target] = true
            waiting[#waiting + 1] = target
          end
        end
      end
    end
  end
  if not label then return nil end
  local behind = {}
  for state in pairs(reached) do behind[#behind + 1] = state end
  table.sort(behind)
  return label, retries, group, behind
end

local function invoke(a)
  local given, instance, speaker, step, most_of_call, most_of_instance, most_tokens, keep, id, invocation, version, held, key, callee, callback, is_retry, token, callback_token, life, late =
    unpack(a)
  if call('HGET', base .. 'instance:' .. instance, 'speaker') ~= speaker then return {'late'} end
  local now = clock(given)
  local mine = base .. 'call:' .. id
  local found = call('HMGET', mine, 'i:' .. invocation, 'version', 'sha', 't')
  local v = found[1] and unpacked(found[1])
  if not v or v[INSTANCE] ~= instance or now >= v[DEADLINE] then return {'no', 'unknown_call'} end
  if v[ASKED][1] == step then
    return v[ASKED][2] == key and v[ASKED][3] or {'no', 'malformed'}
  end
  if not may_step(held, version, found[2], found[3]) then return {'no', 'policy_mismatch'} end
  if tonumber(found[4]) >= most_of_call then return {'full', 'pending tokens of one call', most_of_call} end
  if tonumber(call('GET', base .. 'caused:' .. instance) or 0) >= most_of_instance then
    return {'full', 'pending tokens of one instance', most_of_instance}
  end
  if call('ZCARD', base .. 'tokens') >= most_tokens then return {'full', 'pending tokens', most_tokens} end
  local last = v[LAST]
  local field = last[NUMBER] and edge_field(invocation, last[NUMBER])
  local before = field and get(mine, field)
  local answer, old_token, old_callback
  if is_retry then
    if last[KEY] ~= key or last[LEFT] == 0 or (before and before[IS_CALLED_BACK]) then
      answer = {'no', 'edge_not_allowed', true}
    else
      old_token, old_callback = last[TOKEN], last[CALLBACK]
      last[LEFT] = last[LEFT] - 1
      if before then
        before[NEWEST], before[PENDING] = '', before[PENDING] + (callback ~= '' and 2 or 1)
        if before[IS_ANSWERED] then
          before[IS_ANSWERED] = false
          add_open(v[OPEN], before[GROUP], 1)
        end
        put(mine, field, before)
      end
    end
  else
    local label, retries, group, behind = edge_of(found[3], v[FUNCTION], v[STATES], key, v[OPEN])
    if label == false then return {'cfg', found[3]} end
    if label == nil then
      answer = {'no', 'edge_not_allowed', false, tonumber(found[2]), v[STATES], v[OPEN]}
    else
      v[STATES], v[EDGES] = behind, v[EDGES] + 1
      last = {key, retries, '', '', v[EDGES], group}
      v[LAST] = last
      if group > 0 then add_open(v[OPEN], group, 1) end
      if group > 0 or callback ~= '' then
        put(mine, edge_field(invocation, v[EDGES]), {group, '', 0, false, false, callback ~= '' and 2 or 1})
      end
      if before and is_over(before) then call('HDEL', mine, field) end
    end
  end
  if not answer then
    answer = {'granted', token, callback_token}
    last[TOKEN], last[CALLBACK] = token, callback_token
    local hold = last[JOIN] > 0 or callback ~= ''
    put_token(token, {id, callee, invocation, last[NUMBER], now + life, hold or last[LEFT] > 0 or is_retry, hold, '', instance}, keep)
    if callback ~= '' then
      put_token(callback_token, {id, callback, invocation, last[NUMBER], now + late, false, false, token, instance}, keep)
    end
    call('PEXPIRE', mine, keep)
  end
  v[ASKED] = {step, key, answer}
  put(mine, 'i:' .. invocation, v)
  if old_token then drop_token(old_token, id) end
  if old_callback and old_callback ~= '' then drop_token(old_callback, id) end
  return answer
end

-- Ends

-- Takes an invocation out of its call. Answered: a join that waits for it need not wait any more, unless its edge was taken again.
local function remove(id, invocation, v, is_answered)
  local key = base .. 'call:' .. id
  local caller, number = unpack(v[CALLER])
  local field = caller and edge_field(caller, number)
  local edge = field and get(key, field)
  if edge then
    local waiting = get(key, 'i:' .. caller)
    if waiting and is_answered and edge[GROUP] > 0 and edge[NEWEST] == invocation then
      edge[IS_ANSWERED] = true
      add_open(waiting[OPEN], edge[GROUP], -1)
      put(key, 'i:' .. caller, waiting)
    end
    edge[LIVE] = edge[LIVE] - 1
    if edge[NEWEST] == invocation then edge[NEWEST] = '' end
    keep_edge(key, field, edge, number, waiting)
  end
  call('HDEL', key, 'i:' .. invocation)
  local own = v[LAST][NUMBER] and edge_field(invocation, v[LAST][NUMBER])
  local last = own and get(key, own)
  if last and is_over(last) then call('HDEL', key, own) end
  call('HINCRBY', key, 'n', -1)
  call('ZREM', base .. 'live', id .. ':' .. invocation)
  local mine = base .. 'instance:' .. v[INSTANCE]
  if call('HDEL', mine, 'l:' .. id .. ':' .. invocation) == 1 then call('HINCRBY', mine, 'n', -1) end
  end_if_idle(id)
end

local function finish(a)
  local given, instance, id, invocation, outcome, most, keep = unpack(a)
  local v = get(base .. 'call:' .. id, 'i:' .. invocation)
  local ended = base .. 'ended:' .. instance
  if not v or v[INSTANCE] ~= instance or clock(given) >= v[DEADLINE] then
    local answer = remembered(ended, invocation, outcome)
    return answer and answer[1] == 'finished' and answer or {'no', 'unknown_call'}
  end
  if v[CALLER][1] then remember(ended, invocation, outcome, {'finished'}, most, keep) end
  remove(id, invocation, v, outcome == 'answered')
  return {'finished'}
end

-- Ends an invocation that nobody has ended, and adds to `evicted` what is to be said of it.
local function evict(member, evicted)
  local id, invocation = string.match(member, '^(.*):(.*)$')
  local packed = call('HGET', base .. 'call:' .. id, 'i:' .. invocation)
  if packed then
    local v = unpacked(packed)
    remove(id, invocation, v, false)
    evicted[#evicted + 1] = {v[FUNCTION], id, invocation, v[INSTANCE]}
  else
    call('ZREM', base .. 'live', member)
  end
end

-- `speaker` is RUN:CONNECTION of the agent. A controller that hung may come with an older connection than the one that counts by now.
local function adopt(a)
  local _, instance, owner, keep, speaker = unpack(a)
  local mine = base .. 'instance:' .. instance
  local run, connection = string.match(speaker, '^(.*):(%d+)$')
  local found = call('HGET', mine, 'speaker')
  if found then
    local before, latest = string.match(found, '^(.*):(%d+)$')
    if before == run and tonumber(latest) > tonumber(connection) then return {'late'} end
  end
  call('HSET', mine, 'owner', owner, 'speaker', speaker)
  call('PEXPIRE', mine, keep)
  return {'adopted'}
end

local function forget(a)
  local _, instance, owner = unpack(a)
  local mine = base .. 'instance:' .. instance
  local evicted = {}
  if call('HGET', mine, 'owner') ~= owner then return {false, evicted} end
  for _, field in ipairs(call('HKEYS', mine)) do
    if string.sub(field, 1, 2) == 'l:' then evict(string.sub(field, 3), evicted) end
  end
  call('DEL', mine, base .. 'starts:' .. instance, base .. 'ended:' .. instance)
  return {true, evicted}
end

local function sweep(a)
  local given, most, keep = unpack(a)
  local now = clock(given)
  local due = call('ZRANGEBYSCORE', base .. 'tokens', '-inf', now, 'LIMIT', 0, most)
  for _, member in ipairs(due) do
    local token, id = string.match(member, '^(.*):(.*)$')
    drop_token(token, id)
    end_if_idle(id)
  end
  local evicted = {}
  local over = call('ZRANGEBYSCORE', base .. 'live', '-inf', now, 'LIMIT', 0, most)
  for _, member in ipairs(over) do evict(member, evicted) end
  for _, name in ipairs({'tokens', 'live', 'calls'}) do call('PEXPIRE', base .. name, keep) end
  return {#due == most or #over == most, call('SCARD', base .. 'calls'), call('ZCARD', base .. 'live'), evicted}
end

-- The site

local function fence(a)
  local run, prefix, is_kept = unpack(a)
  local key = base .. 'server'
  local before = call('GET', key)
  if before == run then return 'the same' end
  call('DEL', key)  -- a server without memory refuses what begins with a SET, and would seem to be away: what a fail mode forgives
  call('SET', key, run)
  if before and is_kept then return 'kept from its disk' end
  local dropped = 0
  for _, each in ipairs(call('KEYS', prefix .. '*')) do
    if each ~= key and each ~= base .. 'policies' and each ~= base .. 'envelopes' then
      dropped = dropped + call('DEL', each)
    end
  end
  return before and 'dropped ' .. dropped .. ' keys of before its restart' or 'new'
end

-- An id belongs to one node, and there to the run of the agent that is heard; `run` is '' where that is known.
local function claim(a)
  local id, owner, life, node, run = unpack(a)
  local key = base .. 'instance:' .. id
  local found, agent = call('GET', key), call('GET', base .. 'agent:' .. node)
  if found and found ~= owner then return {false} end
  if run ~= '' and agent and unpacked(agent)[1] ~= run then return {false} end
  call('SET', key, owner, 'PX', life)
  return {true}
end

local function unclaim(a)
  local id, owner = unpack(a)
  if call('GET', base .. 'instance:' .. id) == owner then call('DEL', base .. 'instance:' .. id) end
  return {}
end

-- Another run of an agent may take its name only when nobody has heard this one for a while.
local function hear(node, run, controller, life)
  local key = base .. 'agent:' .. node
  local found = call('GET', key)
  if found and unpacked(found)[1] ~= run then return false end
  call('SET', key, pack({run, controller}), 'PX', life)
  return true
end

local function leave(a)
  local node, run, controller = unpack(a)
  local key = base .. 'agent:' .. node
  local found = call('GET', key)
  found = found and unpacked(found)
  if found and found[1] == run and found[2] == controller then call('DEL', key) end
  return {}
end

-- A controller is here, and hears `agents`, a flat list of (node, run). Returns who is here, and the agents that are another's.
local function beat(a)
  local given, name, life, controller, agent_life, agents = unpack(a)
  local now = clock(given)
  local key = base .. 'controllers'
  call('ZADD', key, now, name)
  call('ZREMRANGEBYSCORE', key, '-inf', now - life)
  call('PEXPIRE', key, life)
  local lost = {}
  for i = 1, #agents, 2 do
    if not hear(agents[i], agents[i + 1], controller, agent_life) then lost[#lost + 1] = agents[i] end
  end
  return {call('ZRANGE', key, 0, -1), lost}
end

-- Offers a policy: it is taken when its version is newer, or when the one that is here is `bad`, by its SHA-1.
local function offer(a)
  local app, version, envelope, bad = unpack(a)
  local newest = tonumber(call('HGET', base .. 'policies', app) or 0)
  if version <= newest and (bad == '' or redis.sha1hex(call('HGET', base .. 'envelopes', app) or '') ~= bad) then return {false} end
  call('HSET', base .. 'policies', app, version)
  call('HSET', base .. 'envelopes', app, envelope)
  return {true}
end

-- `held` is a flat list of (app, version). Returns flat lists: of (app, envelope) that are newer, and of apps that are older here.
local function news(held)
  local version = {}
  for i = 1, #held, 2 do version[held[i]] = held[i + 1] end
  local newer, lacking = {}, {}
  local found = call('HGETALL', base .. 'policies')
  for i = 1, #found, 2 do
    local app, here = found[i], tonumber(found[i + 1])
    if here > (version[app] or 0) then
      newer[#newer + 1] = app
      newer[#newer + 1] = call('HGET', base .. 'envelopes', app) or ''
    elseif here < version[app] then
      lacking[#lacking + 1] = app
    end
    version[app] = nil
  end
  for app in pairs(version) do lacking[#lacking + 1] = app end
  return {newer, lacking}
end

local operations = {
  begin = function(a) return start(a, begin_call) end,
  join = function(a) return start(a, begin_in_call) end,
  invoke = invoke, finish = finish, adopt = adopt, forget = forget, sweep = sweep,
  fence = fence, claim = claim, unclaim = unclaim, beat = beat, leave = leave, offer = offer, news = news,
  agent = function(a) return {hear(unpack(a))} end,
}
return pack(operations[ARGV[1]](unpacked(ARGV[2])))
