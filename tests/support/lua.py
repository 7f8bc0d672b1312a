"""`native.lua` in a LuaJIT of its own, with a stream handle that is a real one as far as the script uses it.

What the handle promises was seen on Envoy 1.40: a chunk dies when the next one is asked for, but the last is still there
behind the loop; metadata is what was set last, by key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import msgspec
from lupa import luajit21

SCRIPT = files("envoy_extproc.envoy").joinpath("native.lua").read_text("utf-8")
STREAM = {":status": "200", "content-type": "text/event-stream; charset=utf-8"}
JSON = {":status": "200", "content-type": "application/json"}

_HANDLE = """
EnvoyTimestampResolution = { MILLISECOND = 0, MICROSECOND = 1 }

local function chunk_of(text)
  local alive = true
  local chunk = { text = text }
  local function check() assert(alive, "object used outside of proper scope") end
  function chunk:length() check() return #self.text end
  function chunk:getBytes(from, size) check() return string.sub(self.text, from + 1, from + size) end
  function chunk:setBytes(text) check() self.text = text return #text end
  function chunk:kill() alive = false end
  return chunk
end

-- pieces: the body as it comes; ended: whether the end comes behind it; cut: called between two chunks.
function run_response(headers, asked, pieces, ended)
  local delivered, told, sets = {}, {}, 0
  local h, now = {}, 1000
  local map = {}
  function map:get(name) return headers[name] end
  function map:replace(name, value)
    assert(type(value) == "string", name)
    headers[name] = value
  end
  function map:remove(name) headers[name] = nil end
  local metadata = {}
  function metadata:get(name)
    if name == "envoy_extproc" then return asked end
    return told
  end
  function metadata:set(name, key, value)
    assert(name == "envoy_extproc_lua", name)
    told[key], sets = value, sets + 1
  end
  local info = {}
  function info:dynamicMetadata() return metadata end
  function h:headers() return map end
  function h:streamInfo() return info end
  function h:timestamp() return now end
  function h:timestampString(resolution)
    assert(resolution == EnvoyTimestampResolution.MICROSECOND)
    return tostring(now) .. "000"
  end
  function h:bodyChunks()
    local number, chunk = 0, nil
    return function()
      number = number + 1
      now = 1000 + number
      if number > #pieces then
        if ended then return nil end
        coroutine.yield() -- cut off: what is behind does not run
      end
      if chunk then
        delivered[#delivered + 1] = chunk
        chunk:kill()
      end
      chunk = chunk_of(pieces[number])
      h.chunk = chunk
      return chunk
    end
  end
  local routine = coroutine.create(envoy_on_response)
  local ok, message = coroutine.resume(routine, h)
  if not ok then error(message) end
  if h.chunk then delivered[#delivered + 1] = h.chunk end
  local texts = {}
  for place, chunk in ipairs(delivered) do texts[place] = chunk.text end
  if not h.chunk then texts = pieces end
  return texts, told, headers, sets
end

function run_request()
  local told = {}
  local h = {}
  function h:streamInfo()
    return { dynamicMetadata = function() return { set = function(_, name, key, value)
      told[name] = { [key] = value }
    end } end }
  end
  envoy_on_request(h)
  return told
end
"""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What one response left: the bytes a client gets, by chunk, the headers, and the metadata.

    Attributes:
        answer: the note, decoded; None where the script read nothing.
        load: the engine's load report, as it was noted; None where there was none.
        sets: how often metadata was written.
    """

    delivered: tuple[bytes, ...]
    headers: Mapping[str, str]
    answer: Mapping[str, Any] | None
    usage: Any
    error: Any
    load: bytes | None
    sets: int

    @property
    def body(self) -> bytes:
        """All that a client gets."""
        return b"".join(self.delivered)


class Script:
    """The script, loaded once; it keeps nothing between two answers."""

    def __init__(self) -> None:
        self._lua = luajit21.LuaRuntime(encoding=None)
        self._lua.execute(_HANDLE.encode())
        self._lua.execute(SCRIPT.encode())
        self._run = self._lua.globals()[b"run_response"]

    def announced(self) -> Mapping[bytes, Any]:
        """The metadata a request sets, by namespace."""
        told = self._lua.globals()[b"run_request"]()
        return {name: dict(values) for name, values in told.items()}

    def respond(
        self,
        pieces: Iterable[bytes],
        *,
        headers: Mapping[str, str] = STREAM,
        ended: bool = True,
        asked: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Told:
        """Plays a response whose body comes in `pieces`; `more` goes over what the server asks by default."""
        wanted: dict[str, Any] | None = {
            "native": 1,
            "id": "id-1",
            "policy": "random",
            "pods": "10.0.0.1:8000 pod-a\n10.0.0.2:8000 pod-b",
            "read": True,
            "limit": 1_048_576,
            **more,
        }
        if asked is not None:
            wanted = dict(asked) or None
        texts, told, after, sets = self._run(
            self._table(headers), None if wanted is None else self._table(wanted), self._list(pieces), ended
        )
        notes = {bytes(key): bytes(value) for key, value in told.items()}
        return Told(
            delivered=tuple(bytes(texts[place + 1]) for place in range(len(texts))),
            headers={key.decode(): value.decode() for key, value in after.items()},
            answer=_decoded(notes.get(b"answer")),
            usage=_decoded(notes.get(b"usage")),
            error=_decoded(notes.get(b"error")),
            load=notes.get(b"load"),
            sets=sets,
        )

    def _table(self, values: Mapping[str, Any]) -> Any:
        return self._lua.table_from(
            {
                key.encode(): value.encode() if isinstance(value, str) else value
                for key, value in values.items()
            }
        )

    def _list(self, pieces: Iterable[bytes]) -> Any:
        listed: Sequence[bytes] = list(pieces)
        return self._lua.table_from(listed)


def _decoded(text: bytes | None) -> Any:
    return None if text is None else msgspec.json.decode(text)
