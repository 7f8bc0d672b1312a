-- Native accounting: what an answer cost, found where its bytes already are, so that no token goes through Python.
--
-- On the request this script announces its version in dynamic metadata (`envoy_extproc_lua.v`), which ext_proc forwards
-- to the server. Only where the server's reply then asks for it (metadata `envoy_extproc.native`) the answer is touched:
--
--   * the response headers get the request's id, the policy, and the pod that served (also after a retry: the route puts
--     %UPSTREAM_REMOTE_ADDRESS% %RESPONSE_CODE_DETAILS% into a header of its own, which is removed here);
--   * with `read`, usage, first and last token, their number and errors inside the answer are noted in metadata
--     `envoy_extproc_lua`, which the gRPC access log carries to the server, one entry for a request however it ends;
--   * with `hide`, what only the server's asking for usage made the engine write is taken out: the usage event, and
--     `"usage":null` in the others. Every other byte is delivered as it came, whatever it is.
--
-- What is usage is decided by place: the event's own top-level member, never a look-alike deeper inside. Which path was
-- called is not asked: an event with `choices` is chat's, completions' or a transcription's, and every other format names
-- its events in a `type` at their top; `TYPES` is the table of those that count. `openai/events.py` is the same in Python,
-- for the stream lane, and the two must say the same of every byte.
--
-- Theory of speed. Engines write one event for each token, and every event of a stream has the same head and the same
-- tail around its text. So once a token has been found by walking the JSON, the next one is expected between the same
-- bytes at the same places: `string.find` there is a memcmp. The responses API numbers its events: there the tail is two,
-- before and behind a run of digits. Only events that do not fit are walked. Code after a loop over `bodyChunks` does not
-- run if the client leaves or the pod resets, so what must outlive that is noted at the 1st, 2nd, 4th, 8th ... token; the
-- access log's count of bytes delivered tells the rest.
--
-- Every wrapper object dies at a yield: `h:streamInfo():dynamicMetadata()` is fetched anew each time. All state is local
-- to one answer. An error in here ends reading, not the answer.

local VERSION = 1
local ASKED, TOLD = "envoy_extproc", "envoy_extproc_lua"
local SERVED = "x-envoy-extproc-served"
local MAX_LOAD = 8192 -- characters of an engine's ORCA report
local MAX_NOTE = 4096 -- bytes of a usage object or an error that go into metadata
local SMALL_JSON = 16384 -- a JSON answer up to here is walked if no usage is found in it
local OVERLAP = 7 -- bytes kept of a chunk: the six of `"usage"` that may be there already, and the one before them
local KEEP = 3 -- bytes at the end of a piece that may be the start of an empty line: CR LF CR

local byte, find, format, gsub, sub = string.byte, string.find, string.format, string.gsub, string.sub
local concat, unpack = table.concat, unpack

-- JSON: positions of values, never values ------------------------------------------------------------------------------

local function space_end(s, i)
  local _, e = find(s, "^[ \t\r\n]*", i)
  return e + 1
end

-- Behind the string that opens at i; nil if it does not close.
local function string_end(s, i)
  i = i + 1
  while true do
    local j = find(s, '["\\]', i)
    if not j then return nil end
    if byte(s, j) == 34 then return j + 1 end
    i = j + 2
  end
end

-- Behind the value that begins at i; nil if it has no end. Inside, only brackets and strings are looked at.
local function value_end(s, i)
  local c = byte(s, i)
  if c == 34 then return string_end(s, i) end
  if c ~= 123 and c ~= 91 then
    local a, e = find(s, "^[^%s,%]}:\"{%[]+", i)
    return a and e + 1
  end
  local depth = 1
  i = i + 1
  while true do
    local j = find(s, '["{}%[%]]', i)
    if not j then return nil end
    c = byte(s, j)
    if c == 34 then
      i = string_end(s, j)
      if not i then return nil end
    else
      i = j + 1
      depth = depth + ((c == 123 or c == 91) and 1 or -1)
      if depth == 0 then return i end
    end
  end
end

-- Calls visit(key, first, last, start) for each member of the object that opens at i, `start` being its key's opening
-- quote; returns what is behind the object, nil if it is none.
local function each_member(s, i, visit)
  if byte(s, i) ~= 123 then return nil end
  i = space_end(s, i + 1)
  if byte(s, i) == 125 then return i + 1 end
  while true do
    local after_key = byte(s, i) == 34 and string_end(s, i)
    if not after_key then return nil end
    local colon = space_end(s, after_key)
    if byte(s, colon) ~= 58 then return nil end
    local first = space_end(s, colon + 1)
    local behind = value_end(s, first)
    if not behind then return nil end
    visit(sub(s, i + 1, after_key - 2), first, behind - 1, i)
    i = space_end(s, behind)
    local c = byte(s, i)
    if c == 125 then return i + 1 end
    if c ~= 44 then return nil end
    i = space_end(s, i + 1)
  end
end

-- Likewise visit(first, last) for each element of an array.
local function each_element(s, i, visit)
  i = space_end(s, i + 1)
  if byte(s, i) == 93 then return i + 1 end
  while true do
    local behind = value_end(s, i)
    if not behind then return nil end
    visit(i, behind - 1)
    i = space_end(s, behind)
    local c = byte(s, i)
    if c == 93 then return i + 1 end
    if c ~= 44 then return nil end
    i = space_end(s, i + 1)
  end
end

local function is_null(s, first, last)
  return last - first == 3 and sub(s, first, last) == "null"
end

-- Characters of the JSON string from its opening to its closing quote.
local function string_length(s, first, last)
  local text = sub(s, first + 1, last - 1)
  if find(text, "\\", 1, true) then
    text = gsub(text, "\\u[dD][89abAB]%x%x\\u[dD][c-fC-F]%x%x", "x")
    text = gsub(text, "\\u%x%x%x%x", "x")
    text = gsub(text, "\\.", "x")
  end
  local _, continued = gsub(text, "[\128-\191]", "")
  return #text - continued
end

-- What one event or one JSON answer says ---------------------------------------------------------------------------------

local TEXTS = { content = true, reasoning = true, reasoning_content = true, refusal = true }

local CALL = 4 -- counts as the length of a piece of a call: one token's, for the JSON around it says nothing

-- Notes the text, reasoning or call in a `delta` or `message`: found(length, first, last) for the one that counts.
local function delta(s, first, last, found)
  if is_null(s, first, last) then return end
  if byte(s, first) ~= 123 then return found(last - first + 1) end
  local call, call_first, call_last
  local done = false
  each_member(s, first, function(key, a, b)
    if done then return end
    if TEXTS[key] then
      if byte(s, a) == 34 then
        if b > a + 1 then
          done = true
          found(string_length(s, a, b), a, b)
        end
      elseif not is_null(s, a, b) then
        done = true
        found(b - a + 1)
      end
    elseif key == "tool_calls" and byte(s, a) == 91 then
      if byte(s, space_end(s, a + 1)) ~= 93 then call, call_first, call_last = CALL, a, b end
    elseif key == "function_call" and not is_null(s, a, b) then
      call = call or CALL
    end
  end)
  if not done and call then found(call, call_first, call_last) end
end

-- Length of what a choice brings and where it stands; nil where it brings nothing, as an event with the role alone.
local function choice(s, first, last)
  if byte(s, first) ~= 123 then return last - first + 1 end
  local length, from, to
  local function found(n, a, b)
    if not length then length, from, to = n, a, b end
  end
  local inner_first, inner_last
  each_member(s, first, function(key, a, b)
    if key == "text" then
      if byte(s, a) == 34 then
        if b > a + 1 then found(string_length(s, a, b), a, b) end
      elseif not is_null(s, a, b) then
        found(b - a + 1)
      end
    elseif (key == "delta" or key == "message") and not is_null(s, a, b) then
      if key == "delta" or not inner_first then inner_first, inner_last = a, b end
    end
  end)
  if not length and inner_first then delta(s, inner_first, inner_last, found) end
  return length, from, to
end

-- Length of a string that stands from first to last, and the place again; nil for an empty one, or none at all.
local function string_at(s, first, last)
  if byte(s, first) ~= 34 or last <= first + 1 then return nil end
  return string_length(s, first, last), first, last
end

local PARTS = { text = 1, thinking = 2, refusal = 3 } -- which counts before which
local CALLS = { partial_json = true, arguments = true, input = true }

-- Likewise of a part of a message or a response, or of what a message's block grows by; and whether it is of a call.
local function part(s, first)
  local rank, from, to, call_first, call_last
  each_member(s, first, function(key, a, b)
    local this = PARTS[key]
    if this then
      if byte(s, a) == 34 and b > a + 1 and not (rank and rank < this) then rank, from, to = this, a, b end
    elseif CALLS[key] and not is_null(s, a, b) and sub(s, a, b) ~= '""' then
      call_first, call_last = a, b
    end
  end)
  if from then return string_length(s, from, to), from, to end
  if call_first then return CALL, call_first, call_last, true end
end

-- What an event is read as, by its type; every other type that ends in ".delta" is a delta, of which the responses API has
-- many.
--   delta: a piece of text under `delta`, or of sound under `audio`      block: a piece of a message's block, under `delta`
--   start: a message's start, with the first half of its usage          usage: usage at the top, and nothing else
--   picture: one that is to become better: no token, but first and last  ends: a stream's end
--   response, failure: likewise, with the whole response
local TYPES = {
  message_start = "start", content_block_delta = "block", message_delta = "usage", message_stop = "ends",
  ["response.completed"] = "response", ["response.incomplete"] = "response", ["response.failed"] = "failure",
  ["transcript.text.done"] = "ends", ["speech.audio.done"] = "ends",
  ["image_generation.partial_image"] = "picture", ["image_generation.completed"] = "ends",
  ["image_edit.partial_image"] = "picture", ["image_edit.completed"] = "ends",
}

-- Members whose places are kept until the type is known, which may stand behind them.
local KEPT = {
  type = true, delta = true, audio = true, message = true, response = true, text = true, content = true, output = true,
}

local function found(body, length, from, to, call)
  if not length then return end
  body.tokens, body.text = body.tokens + 1, body.text + length
  body.from, body.to, body.call = from, to, call
end

-- Places of the members `usage`, if it is an object, and `error`, if it is not null, of the object at i.
local function told_in(s, i)
  local usage_first, usage_last, error_first, error_last
  each_member(s, i, function(key, a, b)
    if key == "usage" then
      usage_first, usage_last = byte(s, a) == 123 and a or nil, b
    elseif key == "error" then
      error_first, error_last = not is_null(s, a, b) and a or nil, b
    end
  end)
  return usage_first, usage_last, error_first, error_last
end

local function typed_delta(s, body, kind)
  local a, b = unpack(body[kind == "speech.audio.delta" and "audio" or "delta"] or {})
  if not a then return end
  local length, from, to = string_at(s, a, b)
  local one = length and (find(kind, "_call", 1, true) or find(kind, "audio.delta", -11, true)) ~= nil
  found(body, one and CALL or length, from, to, one)
end

-- What an event that is named by its type says beyond choices, usage and error at its top.
local function typed(s, body)
  local a, b = body.type[1], body.type[2]
  local kind = byte(s, a) == 34 and sub(s, a + 1, b - 1) or ""
  body.as = TYPES[kind] or find(kind, ".delta", -6, true) and "delta" or nil
  if kind == "error" then body.error = true end
  if body.as == "delta" then
    typed_delta(s, body, kind)
  elseif body.as == "block" then
    if body.delta then found(body, part(s, body.delta[1])) end
  elseif body.as == "start" then
    if body.message then body.half_first, body.half_last = told_in(s, body.message[1]) end
  elseif body.as == "ends" then
    body.done = true
  elseif body.as == "response" or body.as == "failure" then
    body.done = true
    local usage_first, usage_last, error_first, error_last
    if body.response then usage_first, usage_last, error_first, error_last = told_in(s, body.response[1]) end
    if usage_first then body.usage, body.usage_first, body.usage_last = "object", usage_first, usage_last end
    if body.as == "failure" then
      body.error, body.error_first, body.error_last, body.failed = true, error_first, error_last, true
    end
  end
end

-- Text of a JSON answer without choices: a transcription's, a message's, a response's.
local function document(s, body)
  if body.text_at then found(body, string_at(s, body.text_at[1], body.text_at[2])) end
  local function parts(first)
    if byte(s, first) ~= 91 then return end
    each_element(s, first, function(a) found(body, part(s, a)) end)
  end
  if body.content then parts(body.content[1]) end
  if not body.output then return end
  parts(body.output[1])
  if byte(s, body.output[1]) ~= 91 then return end
  each_element(s, body.output[1], function(item)
    local first
    each_member(s, item, function(key, a) if key == "content" then first = a end end)
    if first then parts(first) end
  end)
end

-- The members that count of the JSON text s: a table, or nil if it is no object.
--   tokens, text: pieces that it brings, and how long they are; from, to: where it stands, if it is one alone; call:
--   whether that one is of a call, in an event with a type
--   choices: whether there is one; usage_first, usage_last, usage_start: the member; usage: "null" or "object"
--   half_first, half_last: a message's first half of it
--   error: whether it tells of one; error_first, error_last: the member, if it is one
--   as: what an event with a type is read as; done: whether it ends a stream
local function walk(s)
  local body = { tokens = 0, text = 0, choices = false, error = false }
  local odd = false
  local behind = each_member(s, space_end(s, 1), function(key, first, last, start)
    if KEPT[key] then
      body[key == "text" and "text_at" or key] = { first, last }
    elseif key == "choices" then
      body.choices, body.tokens, body.text, body.from = false, 0, 0, nil
      if is_null(s, first, last) then return end
      if byte(s, first) ~= 91 then odd = true return end
      each_element(s, first, function(a, b)
        body.choices = true
        local length, from, to = choice(s, a, b)
        if length then
          body.tokens, body.text = body.tokens + 1, body.text + length
          body.from, body.to = from, to
        end
      end)
    elseif key == "usage" then
      body.usage_first, body.usage_last, body.usage_start = first, last, start
      body.usage = is_null(s, first, last) and "null" or byte(s, first) == 123 and "object" or nil
    elseif key == "error" then
      body.error = not is_null(s, first, last)
      body.error_first, body.error_last = body.error and first or nil, last
    elseif key == "object" then
      body.object = sub(s, first, last)
    end
  end)
  if not behind or odd or space_end(s, behind) <= #s then return nil end
  if body.object == '"error"' then body.error = true end
  if body.type then typed(s, body) end
  return body
end

-- s without its member that stands from `start` to `last`, and without the comma that separated it.
-- Also tells where the cut begins and what is the first byte behind it.
local function without(s, start, last)
  local comma = find(sub(s, 1, start - 1), ",[ \t\r\n]*$")
  if comma then return sub(s, 1, comma - 1) .. sub(s, last + 1), comma, last + 1 end
  local behind = space_end(s, last + 1)
  if byte(s, behind) == 44 then behind = behind + 1 end
  return sub(s, 1, start - 1) .. sub(s, behind), start, behind
end

-- Server-sent events -----------------------------------------------------------------------------------------------------

-- The last byte of the line end at i; nil if there is none, or only a CR that may be half of a CRLF.
local function line_end(s, i)
  local c = byte(s, i)
  if c == 10 then return i end
  if c ~= 13 then return nil end
  local next = byte(s, i + 1)
  if not next then return nil end
  return next == 10 and i + 1 or i
end

-- The last byte of the first empty line at or behind `from`.
local function empty_line(s, from, crs)
  if not crs then
    local lf = find(s, "\n\n", from, true)
    return lf and lf + 1
  end
  while true do
    local i = find(s, "[\r\n]", from)
    if not i then return nil end
    local first = line_end(s, i)
    local second = first and line_end(s, first + 1)
    if second then return second end
    from = i + 1
  end
end

-- The event's data, of several lines joined with LF; and where it stands if it is one line alone.
local function data_of(event)
  local data, at
  local i, size = 1, #event
  if sub(event, 1, 3) == "\239\187\191" then i = 4 end
  while i <= size do
    local stop = find(event, "[\r\n]", i) or size + 1
    if sub(event, i, i + 4) == "data:" then
      local first = byte(event, i + 5) == 32 and i + 6 or i + 5
      local line = sub(event, first, stop - 1)
      if data then
        data, at = data .. "\n" .. line, nil
      else
        data, at = line, first
      end
    end
    i = stop + 1
  end
  return data or "", at
end

-- What has been seen of an answer ----------------------------------------------------------------------------------------

local function new_answer(streamed)
  return {
    streamed = streamed, tokens = 0, text = 0, delivered = 0, removed = 0, oversized = 0, unreadable = 0,
    done = false, ended = false, mark = 1,
  }
end

-- Microseconds since 1970.
local function now(h)
  return tonumber(h:timestampString(EnvoyTimestampResolution.MICROSECOND))
end

local function number(value)
  return value and format("%.0f", value) or "null"
end

-- An engine's bytes for metadata. Envoy sends strings there as they are, and no server can take a message of its log in
-- which one is no UTF-8: every entry of that message would be lost. Numbers and codes are ASCII.
local function plain(text)
  return (gsub(text, "[\128-\255]", "?"))
end

-- Writes what is known into metadata. One string: each value set costs Envoy a message of its own.
local function note(h, answer)
  local metadata = h:streamInfo():dynamicMetadata()
  metadata:set(TOLD, "answer", format(
    '{"streamed":%s,"ended":%s,"done":%s,"tokens":%d,"text":%d,"delivered":%d,"head":%d,"first":%s,"last":%s,"removed":%d,'
      .. '"oversized":%d,"unreadable":%d,"unread":"%s","failure":%s}',
    tostring(answer.streamed), tostring(answer.ended), tostring(answer.done), answer.tokens, answer.text,
    answer.delivered, answer.head or 0, number(answer.first), number(answer.last), answer.removed, answer.oversized,
    answer.unreadable, answer.unread or "", answer.failure and "true" or "false"))
  if not answer.fresh then return end
  answer.fresh = false
  local usage = answer.usage or answer.begun and "[" .. answer.begun .. "]"
  if usage then metadata:set(TOLD, "usage", plain(usage)) end
  if answer.error then metadata:set(TOLD, "error", plain(answer.error)) end
end

-- Whether a usage object holds tokens; a transcription's may hold seconds.
local function holds_tokens(usage)
  if not find(usage, '"duration"', 1, true) then return true end
  local tokens = true
  each_member(usage, 1, function(key, a, b)
    if key == "type" then tokens = sub(usage, a, b) ~= '"duration"' end
  end)
  return tokens
end

-- Usage is noted as the engine wrote it; of a message that told a first half, as an array of both.
local function remember_usage(answer, usage)
  if #usage > MAX_NOTE or not holds_tokens(usage) then return end
  answer.usage, answer.fresh = answer.begun and "[" .. answer.begun .. "," .. usage .. "]" or usage, true
end

-- An error is noted as the event that tells of it; of a long one only the member.
local function remember_error(answer, body, s)
  local short = body.error_first and body.error_last - body.error_first < MAX_NOTE
  if body.failed or #s > MAX_NOTE then
    answer.error = '{"error":' .. (short and sub(s, body.error_first, body.error_last) or "{}") .. "}"
  else
    answer.error = s
  end
  answer.fresh = true
end

local function remember(answer, body, s)
  if body.half_first and body.half_last - body.half_first < MAX_NOTE then
    answer.begun, answer.fresh = sub(s, body.half_first, body.half_last), true
  end
  if body.usage == "object" then remember_usage(answer, sub(s, body.usage_first, body.usage_last)) end
  if body.error then remember_error(answer, body, s) end
end

-- Reads a stream. `pending` is what has come of an event that is not whole yet. The shape of a token's event: `head`, the
-- bytes right before its text, stand at `offset`, `tail` behind the text; `around` is how long all but the text is. Where
-- an engine writes `"usage":null` last and it is to be hidden, the last `cut` bytes of such an event are replaced by `rest`.
-- Of events that are numbered behind their text there is no `offset` but a `number`: `head` is all before the text, and
-- `tail` and `behind` are what stands around the digits.
local function new_reader(hide, limit)
  return {
    answer = new_answer(true), hide = hide, limit = limit, pending = "", scanned = 1, skipping = false, crs = false,
    offset = nil, head = "", tail = "", around = 0, call = nil, cut = 0, rest = "", number = false, behind = "",
  }
end

local HEAD = 10 -- bytes: `content":"`

-- Learns the shape of an event by the token found in it; `data_at` is where its data stands, `cut` and `rest` as above.
local function learn(reader, event, data_at, body, cut, rest)
  reader.offset, reader.number = nil, false
  if reader.crs or not data_at or body.tokens ~= 1 or not body.from then return end
  local opening, closing = data_at + body.from - 1, data_at + body.to - 1
  reader.offset = body.as and 1 or opening - HEAD + 1
  reader.head = sub(event, reader.offset, opening)
  reader.tail = sub(event, closing)
  reader.around = opening + #reader.tail
  reader.call = (body.call or byte(event, closing) == 93) and CALL or nil
  reader.cut, reader.rest = cut, rest
  local _, _, before, behind = find(reader.tail, '"sequence_number": ?()%d+()')
  if body.as and before then
    reader.offset, reader.number = nil, true
    reader.tail, reader.behind = sub(reader.tail, 1, before - 1), sub(reader.tail, behind)
  end
end

-- Whether s is one event of the shape learned, and nothing else; its text may be empty.
local function fits(reader, s, size)
  local offset = reader.offset
  if not offset or size < reader.around or size > reader.limit then return false end
  local tail = size - #reader.tail + 1
  return find(s, "\n\n", 1, true) == size - 1 and find(s, reader.head, offset, true) == offset
    and find(s, reader.tail, tail, true) == tail
end

-- Bytes of text in s if it is one event of the numbered shape learned, and nothing else; nil if it is not.
local function numbered(reader, s, size)
  local behind, head = size - #reader.behind + 1, #reader.head
  if behind <= head or find(s, reader.behind, behind, true) ~= behind then return nil end
  local digit = behind - 1
  local c = byte(s, digit)
  while c and c >= 48 and c <= 57 do
    digit = digit - 1
    c = byte(s, digit)
  end
  local tail = digit - #reader.tail + 1
  if digit == behind - 1 or tail <= head or find(s, reader.tail, tail, true) ~= tail then return nil end
  if find(s, reader.head, 1, true) ~= 1 or find(s, "\n", head + 1, true) ~= size - 1 then return nil end
  return tail - head - 1
end

local function count(answer, tokens, text, at)
  answer.tokens = answer.tokens + tokens
  answer.text = answer.text + text
  answer.last = at
  if not answer.first then answer.first = at end
end

-- The event as the client is to see it; "" where it is not to see it.
local function shown_of(reader, event, at)
  local answer, size = reader.answer, #event
  if fits(reader, event, size) then
    if size > reader.around then count(answer, 1, reader.call or size - reader.around, at) end
    return reader.cut == 0 and event or sub(event, 1, size - reader.cut) .. reader.rest
  end
  local text = reader.number and numbered(reader, event, size)
  if text then
    if text > 0 then count(answer, 1, reader.call or text, at) end
    return event
  end
  local data, data_at = data_of(event)
  if data == "" then return event end
  if data == "[DONE]" then
    answer.done, answer.fresh = true, true
    return event
  end
  local body = walk(data)
  if not body then
    answer.unreadable = answer.unreadable + 1
    return event
  end
  remember(answer, body, data)
  if body.done then answer.done, answer.fresh = true, true end
  if body.tokens > 0 then
    count(answer, body.tokens, body.text, at)
  elseif body.as == "picture" then
    count(answer, 0, 0, at)
    answer.fresh = true
  end
  if not (reader.hide and body.usage) or body.as then
    if body.tokens > 0 and body.usage ~= "object" then learn(reader, event, data_at, body, 0, "") end
    return event
  end
  if body.usage == "object" then
    if body.choices or body.error then return event end
    answer.removed = answer.removed + 1
    return ""
  end
  if not data_at then return event end
  local shorter, cut, behind = without(data, body.usage_start, body.usage_last)
  if body.tokens > 0 and body.to < cut and find(data, "^[ \t]*}[ \t]*$", behind) then
    learn(reader, event, data_at, body, size - (data_at + cut - 1) + 1, sub(event, data_at + behind - 1))
  end
  return sub(event, 1, data_at - 1) .. shorter .. sub(event, data_at + #data)
end

-- Takes a chunk; returns what is to be passed on instead, nil to pass it on as it is.
local function feed(reader, s, at)
  local held = reader.pending
  local text = held == "" and s or held .. s
  if not reader.crs and find(s, "\r", 1, true) then
    reader.crs, reader.offset, reader.number = true, nil, false
  end
  local out, changed, start, scan = {}, false, 1, reader.scanned
  while true do
    local stop = empty_line(text, scan, reader.crs)
    if not stop then break end
    local event = sub(text, start, stop)
    local shown = event
    if reader.skipping then
      reader.skipping = false
    elseif #event > reader.limit then
      reader.answer.oversized = reader.answer.oversized + 1
    else
      shown = shown_of(reader, event, at)
      changed = changed or shown ~= event
      local answer = reader.answer
      if answer.tokens > 0 and not answer.head then
        answer.head = answer.delivered + start - 1 - (reader.hide and 0 or #held)
      end
    end
    out[#out + 1] = shown
    start, scan = stop + 1, stop + 1
  end
  local rest = start == 1 and text or sub(text, start)
  if #rest > reader.limit and not reader.skipping then
    reader.skipping = true
    reader.answer.oversized = reader.answer.oversized + 1
  end
  if reader.skipping and #rest > KEEP then
    out[#out + 1] = sub(rest, 1, -KEEP - 1)
    rest = sub(rest, -KEEP)
  end
  reader.pending = rest
  reader.scanned = #rest > KEEP and #rest - KEEP + 1 or 1
  if reader.hide and (changed or held ~= "" or rest ~= "") then return concat(out) end
  return nil
end

-- The end of the stream; returns what is still to be delivered: a tail without its empty line, read like an event.
local function finish(reader, at)
  local rest = reader.pending
  if rest == "" then return "" end
  local shown = shown_of(reader, rest, at)
  return reader.hide and shown or ""
end

-- Takes what is held back and what came as they are, and reads no more: something in here went wrong.
local function give_up(reader, s, failure)
  local held = reader.pending
  reader.pending, reader.offset, reader.number, reader.answer.failure = "", nil, false, failure
  return reader.hide and held ~= "" and held .. s or nil
end

-- The slow way of a chunk; returns what the client is to see of it.
local function pass_on(h, reader, chunk, s)
  if reader.answer.failure then return s end
  local ok, shown = pcall(feed, reader, s, now(h))
  if not ok then shown = give_up(reader, s, shown) end
  if not shown then return s end
  chunk:setBytes(shown)
  return shown
end

-- The answer was headers alone, and nothing is to be missed in it.
local function nothing_came(answer)
  answer.streamed, answer.unread = false, "content-type"
end

local function end_stream(h, reader, last, last_shown)
  local answer = reader.answer
  answer.ended = true
  if not last then
    nothing_came(answer)
  elseif not answer.failure then
    local ok, rest = pcall(finish, reader, now(h))
    if not ok then answer.failure, rest = rest, reader.hide and reader.pending or "" end
    -- Envoy does not say which chunk is the last, but the last one is still at hand behind the loop.
    if rest ~= "" then last:setBytes(last_shown .. rest) end
  end
  note(h, answer)
end

local function read_stream(h, reader)
  local answer = reader.answer
  local last, shown
  for chunk in h:bodyChunks() do
    local size = chunk:length()
    last, shown = chunk, ""
    if size > 0 then
      local s = chunk:getBytes(0, size)
      if reader.pending == "" and fits(reader, s, size) then
        local text = size - reader.around
        if text > 0 then
          answer.tokens = answer.tokens + 1
          answer.text = answer.text + (reader.call or text)
          answer.last = h:timestamp() * 1000
        end
        shown = s
        if reader.cut > 0 then
          shown = sub(s, 1, size - reader.cut) .. reader.rest
          chunk:setBytes(shown)
        end
      else
        local text = reader.number and reader.pending == "" and numbered(reader, s, size)
        if text then
          shown = s
          if text > 0 then count(answer, 1, reader.call or text, h:timestamp() * 1000) end
        else
          shown = pass_on(h, reader, chunk, s)
        end
      end
      answer.delivered = answer.delivered + #shown
      if answer.tokens >= answer.mark or answer.fresh then
        answer.mark = answer.tokens * 2 + 1
        note(h, answer)
      end
    end
  end
  end_stream(h, reader, last, shown)
end

-- JSON answers -----------------------------------------------------------------------------------------------------------

-- The top-level usage object in `text`, the rest of a JSON text that begins with a key: what is at its level is known at
-- the end, where exactly one bracket must close that did not open in here. Engines write usage near the end, so the
-- megabytes before it are never walked.
local function usage_in_rest(text)
  local depth, i = 0, 1
  local found = {}
  while true do
    local j = find(text, '["{}%[%]]', i)
    if not j then break end
    local c = byte(text, j)
    if c == 34 then
      local behind = string_end(text, j)
      if not behind then return nil end
      i = behind
      if behind - j == 7 and sub(text, j, behind - 1) == '"usage"' then
        local colon = space_end(text, behind)
        local first = byte(text, colon) == 58 and space_end(text, colon + 1)
        if first and byte(text, first) == 123 then
          local stop = value_end(text, first)
          if not stop then return nil end
          found[depth] = sub(text, first, stop - 1)
          i = stop
        elseif first then
          found[depth] = nil -- of several members of one name the last counts
        end
      end
    else
      depth = depth + ((c == 123 or c == 91) and 1 or -1)
      i = j + 1
    end
  end
  return found[depth + 1]
end

-- Reads a JSON answer, which is passed on as it is. Pieces are kept from the first place where usage may begin; before
-- it, only while the answer is small enough to be walked as a whole.
local function new_json(limit)
  return { answer = new_answer(false), limit = limit, pieces = {}, kept = 0, size = 0, from = nil, overlap = "" }
end

local function feed_json(reader, s)
  reader.size = reader.size + #s
  if reader.from then
    reader.kept = reader.kept + #s
    reader.pieces[#reader.pieces + 1] = s
  else
    local whole = reader.overlap .. s
    local place = reader.overlap == "" and 0 or 1 -- the overlap's first byte was looked at before
    repeat
      place = find(whole, '"usage"', place + 1, true)
    until not place or byte(whole, place - 1) ~= 92
    if place then
      reader.from = sub(whole, place)
      reader.kept = #reader.from
    else
      reader.overlap = sub(whole, -OVERLAP)
    end
    if reader.small == nil or reader.small then
      reader.small = (reader.small or "") .. s
      if #reader.small > SMALL_JSON then reader.small = false end
    end
  end
  if reader.from and reader.kept > reader.limit then
    reader.from, reader.pieces, reader.kept = nil, {}, 0
    reader.answer.oversized = 1
  end
end

-- Whether s is JSON, but no object: the array of a tokenizer or of SGLang's rerank, a bare number.
local function is_bare(s)
  local first = space_end(s, 1)
  local c = byte(s, first)
  if not c or c == 123 then return false end
  local behind = value_end(s, first)
  if not behind or space_end(s, behind) <= #s then return false end
  local word = sub(s, first, behind - 1)
  return c == 91 or c == 34 or word == "null" or word == "true" or word == "false"
    or find(word, "^-?%d+%.?%d*[eE]?[+-]?%d*$") ~= nil
end

local function finish_document(answer, body, text)
  remember(answer, body, text)
  if answer.usage then return end
  document(text, body)
  answer.tokens, answer.text = body.tokens, body.text
end

local function finish_json(reader)
  local answer = reader.answer
  if reader.size == 0 or answer.oversized > 0 then return end
  local rest = reader.from and concat(reader.pieces) or ""
  local usage = reader.from and usage_in_rest(reader.from .. rest)
  if usage then remember_usage(answer, usage) end
  answer.fresh = true
  local text = reader.small and reader.small .. rest
  if text and (not answer.usage or #text <= SMALL_JSON and find(text, '"error"', 1, true)) then
    local body = walk(text)
    if not body and not is_bare(text) then
      answer.unreadable = 1
      return
    end
    if body then finish_document(answer, body, text) end
  end
  answer.done = true
end

local function read_json(h, reader)
  local answer = reader.answer
  local came = false
  for chunk in h:bodyChunks() do
    came = true
    local size = chunk:length()
    if size > 0 and not answer.failure and answer.oversized == 0 then
      local ok, failure = pcall(feed_json, reader, chunk:getBytes(0, size))
      if not ok then answer.failure = failure end
    end
  end
  answer.ended = true
  if not came then
    nothing_came(answer)
  elseif not answer.failure then
    local ok, failure = pcall(finish_json, reader)
    if not ok then answer.failure = failure end
  end
  note(h, answer)
end

-- Envoy's side -----------------------------------------------------------------------------------------------------------

function envoy_on_request(h)
  h:streamInfo():dynamicMetadata():set(TOLD, "v", VERSION)
end

local function media_type(headers)
  local value = headers:get("content-type") or ""
  return string.lower((string.match(value, "^%s*([^;%s]*)")))
end

local function is_encoded(headers)
  local value = string.lower(headers:get("content-encoding") or "")
  return value ~= "" and value ~= "identity"
end

-- Address of the pod that answered; nil where Envoy did. A pod's answer has no details yet when the header is made.
local function served_by(value)
  local address, details = string.match(value or "", "^(%S+) ?(%S*)")
  return (details == "" or details == "-" or details == "via_upstream") and address or nil
end

-- What the engine tells of its load, an ORCA report; `set_headers` takes it off or puts ours in its place.
local function note_load(h, headers)
  local load = headers:get("endpoint-load-metrics-bin")
  load = load and "BIN " .. load or headers:get("endpoint-load-metrics")
  if load and #load <= MAX_LOAD then h:streamInfo():dynamicMetadata():set(TOLD, "load", plain(load)) end
end

-- The value for `address` in lines of "address value"; nil where it has none.
local function value_of(lines, address)
  local _, stop = find("\n" .. lines, "\n" .. address .. " ", 1, true)
  return stop and string.match(lines, "^[^\n]*", stop)
end

-- The headers that every routed answer carries. `pods` and `sessions` are of those who may have served.
local function set_headers(headers, asked, served)
  headers:replace("x-request-id", asked.id)
  headers:replace("request-id", asked.id)
  headers:replace("routing-strategy", asked.policy)
  if served then
    headers:replace("target-pod", value_of(asked.pods, served) or served)
    headers:replace("target-pod-ip", served)
    local session = asked.sessions and value_of(asked.sessions, served)
    if session then headers:replace("x-session-id", session) end
  end
  for name, value in string.gmatch(asked.extras or "", "([^ \n]+) ([^\n]*)") do headers:replace(name, value) end
  headers:remove("endpoint-load-metrics-bin")
  if asked.load then
    headers:replace("endpoint-load-metrics", asked.load)
  else
    headers:remove("endpoint-load-metrics")
  end
end

function envoy_on_response(h)
  local headers = h:headers()
  local served = headers:get(SERVED)
  if served then headers:remove(SERVED) end
  local asked = h:streamInfo():dynamicMetadata():get(ASKED)
  if not asked or asked.native ~= VERSION then return end
  served = served_by(served)
  if served then note_load(h, headers) end
  set_headers(headers, asked, served)
  local status = tonumber(headers:get(":status")) or 0
  if not asked.read or status >= 300 then return end
  local kind = media_type(headers)
  local streamed = kind == "text/event-stream"
  if is_encoded(headers) or not (streamed or kind == "application/json") then
    local answer = new_answer(streamed)
    answer.unread = is_encoded(headers) and "compressed" or "content-type"
    note(h, answer)
  elseif streamed then
    if asked.hide then headers:remove("content-length") end
    read_stream(h, new_reader(asked.hide == true, asked.limit))
  else
    read_json(h, new_json(asked.limit))
  end
end
