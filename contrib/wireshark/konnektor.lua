-- A Wireshark dissector for konnektor's protocol, version 1, as docs/protocol.md specifies it.
--
-- Each frame is judged by itself, as a receiver judges it before it looks at the session's state: what depends on
-- credit, stream ids, the order of frames or the peer's MAX_FRAME is not. What a receiver would close the session for is
-- an expert info named after the error's code (konnektor.error.*); dissection goes on after it by the frame's length.
--
-- For Wireshark and tshark 4.0 or later, so for Lua 5.2 to 5.4: no operators or libraries that only some of them have.

local konnektor = Proto("konnektor", "konnektor tunnel protocol")

local ALPN = "konnektor/1"
local HEADER_SIZE = 8
local MAX_PAYLOAD = 65535
local MAX_HELLO = 4096
local MAX_OPEN = 8192
local MAX_TEXT = 200
local MAX_INFO = 1000 -- characters in the info column, which holds 4,096

-- Names ---------------------------------------------------------------------------------------------------------------

local CLASSES = {[0] = "interactive", [1] = "default", [2] = "bulk"}

local CODES = {
    [0] = "NO_ERROR", [1] = "PROTOCOL", [2] = "FRAME_SIZE", [3] = "FLOW_CONTROL", [4] = "STREAM_STATE", [5] = "CALM",
    [6] = "TIMEOUT", [7] = "SHUTDOWN", [8] = "INTERNAL", [9] = "VERSION", [10] = "IDENTITY", [11] = "RESUME_REFUSED",
    [32] = "DENIED", [33] = "UNSUPPORTED", [34] = "CONNECT_REFUSED", [35] = "UNREACHABLE", [36] = "DNS",
    [37] = "DIAL_TIMEOUT", [38] = "NO_ROUTE", [39] = "LIMIT", [40] = "CANCELLED", [41] = "TARGET_RESET",
    [42] = "TARGET_TLS",
}

-- Parameters of OPEN and ACCEPT, settings of HELLO: name, filter, kind of value, and the floor if there is one.
local PARAMETERS = {
    [1] = {"HEADER", "header", "header"},
    [2] = {"DEADLINE", "deadline", "u32"},
    [4] = {"TRACEPARENT", "traceparent", "words"},
    [6] = {"SOURCE", "source", "words"},
}
local SETTINGS = {
    [1] = {"MAX_FRAME", "max_frame", "u32", floor = 16376},
    [2] = {"INITIAL_WINDOW", "initial_window", "u32", floor = 16384},
    [3] = {"INITIAL_STREAMS", "initial_streams", "u32", floor = 8},
    [4] = {"IDLE_TIMEOUT", "idle_timeout", "u32", floor = 30000},
    [5] = {"FEATURES", "features", "features"},
    [6] = {"SOFTWARE", "software", "words"},
    [7] = {"INSTANCE", "instance", "instance"},
    [8] = {"NAME", "name", "words"},
    [9] = {"ROUTES", "route", "lines"},
    [10] = {"LABELS", "label", "lines"},
    [11] = {"SESSION_ID", "session_id", "bytes"},
    [12] = {"RESUME_KEY", "resume_key", "bytes"},
    [13] = {"RESUME_INTENT", "resume_intent", "bytes"},
    [14] = {"AFRESH", "afresh", "bytes"},
}

-- What a frame is made of: filter, kind and title of each field, in the order of the wire. The least and the greatest
-- length follow from the kinds, but for those that are stated. `info` is what the info column says of the values.
local CODE, TEXT = {"code", "code", "Code"}, {"text", "text", "Text"}
local CLASS, PAYLOAD = {"class", "class", "Class"}, {"payload", "rest", "Payload"}
local SEQUENCE, MAC = {"rx_seq", "u64", "Sequence"}, {"mac", "bytes32", "MAC"}
local OPAQUE = {"opaque", "u64", "Opaque"}

local FRAMES = {
    [0x00] = {name = "DATA", on_stream = true, flags = 3, info = "{size}{flags}", PAYLOAD},
    [0x01] = {
        name = "OPEN", on_stream = true, least = 3, most = MAX_OPEN, info = "{name}{target}",
        CLASS, {"name", "name", "Stream type"}, {"tlv", "tlvs", "Parameter", PARAMETERS},
    },
    [0x02] = {name = "ACCEPT", on_stream = true, most = MAX_OPEN, info = "", {"tlv", "tlvs", "Parameter", PARAMETERS}},
    [0x03] = {
        name = "REFUSE", on_stream = true, info = "{code}{text}",
        CODE, {"retry_ms", "u32", "Retry after (ms)"}, TEXT,
    },
    [0x04] = {
        name = "RESET", on_stream = true, info = "{code} at {final_offset}{text}",
        CODE, {"final_offset", "u64", "Final offset"}, TEXT,
    },
    [0x05] = {name = "STOP", on_stream = true, info = "{code}", CODE},
    [0x06] = {name = "CREDIT", on_stream = true, info = "{max_offset}", {"max_offset", "u64", "Offset"}},
    [0x07] = {name = "STREAMS", info = "{max_opens}", {"max_opens", "u64", "Number of OPENs"}},
    [0x08] = {
        name = "GOAWAY", info = "{code}, last id {last_id}{text}",
        {"last_id", "u32", "Last id"}, CODE, {"grace_ms", "u32", "Grace (ms)"}, TEXT,
    },
    [0x40] = {
        name = "HELLO", most = MAX_HELLO, info = "version {vmin} to {vmax}{endpoint}",
        {"magic", "magic", "Magic"}, {"vmin", "u8", "Lowest version"}, {"vmax", "u8", "Highest version"},
        {"reserved", "u16", "Reserved"}, {"nonce", "bytes32", "Nonce"}, {"tlv", "tlvs", "Setting", SETTINGS},
    },
    [0x41] = {
        name = "RESUME", info = "attempt {attempt} after {rx_seq}",
        {"session_id", "bytes16", "Session id"}, {"attempt", "u32", "Attempt"}, SEQUENCE, MAC,
    },
    [0x42] = {name = "RESUMED", info = "after {rx_seq}", SEQUENCE, MAC},
    [0x43] = {name = "ACK", info = "{seq}", {"seq", "u64", "Sequence"}},
    [0x44] = {name = "PING", info = "{opaque}", OPAQUE},
    [0x45] = {name = "PONG", info = "{opaque}", OPAQUE, {"rx_bytes", "u64", "Received bytes"}},
    [0x46] = {name = "DATAGRAM", on_stream = true, info = "{size}", {"context", "u8", "Context"}, PAYLOAD},
    [0x47] = {name = "CLOSE", info = "{code}{text}", CODE, TEXT},
    [0x80] = {name = "PRIORITY", on_stream = true, info = "{class} {weight}", CLASS, {"weight", "u8", "Weight"}},
}

-- Expert infos --------------------------------------------------------------------------------------------------------

local experts = {}

local function expert_info(name, text, group, severity)
    experts[name] = ProtoExpert.new("konnektor." .. name, text, expert.group[group], expert.severity[severity])
end

expert_info("error.protocol", "PROTOCOL: a rule of the protocol is broken", "PROTOCOL", "ERROR")
expert_info("error.frame_size", "FRAME_SIZE: a length that does not fit", "MALFORMED", "ERROR")
expert_info("error.flow_control", "FLOW_CONTROL: an impossible grant", "PROTOCOL", "ERROR")
expert_info("unknown_frame", "A frame of an unknown type, which a receiver skips", "UNDECODED", "NOTE")
expert_info("unknown_tlv", "A TLV with an unknown id, which a receiver skips", "UNDECODED", "NOTE")
expert_info("critical_tlv", "A critical TLV with an unknown id: the stream is refused", "UNDECODED", "WARN")
expert_info("malformed_header", "The stream type's header is malformed", "MALFORMED", "WARN")
expert_info("truncated", "The capture holds only a part of the frame", "UNDECODED", "WARN")

konnektor.experts = experts

-- An error in the sense of the protocol: the subtree says it, and so does the frame's line in the info column.
local function complain(context, item, kind, text)
    item:add_proto_expert_info(experts["error." .. kind], text)
    context.error = context.error or string.upper(kind)
end

-- Fields --------------------------------------------------------------------------------------------------------------

local fields = {}

local function define(name, title, of, ...)
    fields[name] = ProtoField[of]("konnektor." .. name, title, ...)
end

local CODE_RANGES = {{0x80000000, 0xFFFFFFFF, "application"}}
for code, name in pairs(CODES) do
    table.insert(CODE_RANGES, {code, code, name})
end

-- Kinds of values: their size, if they have one, and the field that shows them. `text` is the Text of the specification,
-- `words` a text without its limit, `lines` one text a line, `instance` 16 bytes or none.
local KINDS = {
    u8 = {1, "uint8"}, u16 = {2, "uint16"}, u32 = {4, "uint32"}, u64 = {8, "uint64"},
    class = {1, "uint8", base.DEC, CLASSES}, code = {4, "uint32", base.DEC + base.RANGE_STRING, CODE_RANGES},
    features = {4, "uint32", base.HEX}, magic = {4, "string"}, bytes16 = {16, "bytes"}, bytes32 = {32, "bytes"},
    rest = {nil, "bytes"}, bytes = {nil, "bytes"}, instance = {nil, "bytes"}, header = {nil, "bytes"},
    name = {nil, "string"}, text = {nil, "string"}, words = {nil, "string"}, lines = {nil, "string"},
}

local function define_value(name, title, kind)
    define(name, title, KINDS[kind][2], KINDS[kind][3], KINDS[kind][4])
end

local TYPES = {}
for number, frame in pairs(FRAMES) do
    TYPES[number] = frame.name
    frame.prefix = string.lower(frame.name) .. "."
    local size, open_end = 0, 0
    for _, part in ipairs(frame) do
        local name, kind, title, known = frame.prefix .. part[1], part[2], part[3], part[4]
        if kind == "tlvs" then
            local ids = {}
            for id, tlv in pairs(known) do
                ids[id] = tlv[1]
                define_value(frame.prefix .. tlv[2], tlv[1], tlv[3])
            end
            define(name, title, "none")
            define(name .. ".id", "Id", "uint16", base.DEC, ids)
            define(name .. ".length", "Length", "uint16")
            define(name .. ".value", "Value", "bytes")
        else
            define_value(name, title, kind)
            size = size + (KINDS[kind][1] or 0)
            open_end = kind == "text" and MAX_TEXT or kind == "rest" and MAX_PAYLOAD or open_end
        end
    end
    frame.least = frame.least or size
    frame.most = frame.most or math.min(size + open_end, MAX_PAYLOAD)
end

for _, name in ipairs({"tcp", "udp"}) do
    define("open." .. name .. ".host", "Host", "string")
    define("open." .. name .. ".port", "Port", "uint16")
end
define("open.name_length", "Length of the stream type", "uint8")
define("hello.features.resume", "Resume", "bool", 32, nil, 1)
define("hello.features.datagrams", "Datagrams", "bool", 32, nil, 2)
define("frame", "Frame", "none")
define("type", "Type", "uint8", base.HEX, TYPES)
define("type.ignorable", "Ignorable", "bool", 8, nil, 0x80)
define("type.unsequenced", "Unsequenced", "bool", 8, nil, 0x40)
define("flags", "Flags", "uint8", base.HEX)
define("flags.fin", "FIN", "bool", 8, nil, 1)
define("flags.blocked", "BLOCKED", "bool", 8, nil, 2)
define("length", "Length", "uint16")
define("stream", "Stream", "uint32")
define("undecoded", "Not decoded", "bytes")

konnektor.fields = fields

-- Text ----------------------------------------------------------------------------------------------------------------

-- First byte of a UTF-8 sequence: how many follow, and from where to where the next may be (Unicode, table 3-7).
local function utf8_lead(byte)
    if byte >= 0xC2 and byte <= 0xDF then return 1, 0x80, 0xBF end
    if byte >= 0xE0 and byte <= 0xEF then return 2, byte == 0xE0 and 0xA0 or 0x80, byte == 0xED and 0x9F or 0xBF end
    if byte >= 0xF0 and byte <= 0xF4 then return 3, byte == 0xF0 and 0x90 or 0x80, byte == 0xF4 and 0x8F or 0xBF end
    return nil
end

-- A peer's text, fit to be shown: C0, C1 and DEL become "?", and what is not UTF-8 the replacement character.
local function clean(raw)
    local out, pos = {}, 1
    while pos <= #raw do
        local first = string.byte(raw, pos)
        local stop = pos
        if first < 0x80 then
            table.insert(out, (first < 0x20 or first == 0x7F) and "?" or string.char(first))
        else
            local more, low, high = utf8_lead(first)
            while more and more > 0 do
                local byte = string.byte(raw, stop + 1)
                if not byte or byte < low or byte > high then break end
                stop, more, low, high = stop + 1, more - 1, 0x80, 0xBF
            end
            if more ~= 0 then
                table.insert(out, "\239\191\189")
            elseif first == 0xC2 and string.byte(raw, stop) <= 0x9F then
                table.insert(out, "?")
            else
                table.insert(out, string.sub(raw, pos, stop))
            end
        end
        pos = stop + 1
    end
    return table.concat(out)
end

-- MessagePack ---------------------------------------------------------------------------------------------------------

-- By first byte: the token's kind, the bytes of its number (a uint's value, a length or a count), and what follows that:
-- `beside` bytes, or `each` items for one that is counted.
local TOKENS = {[0xC1] = false}
local function tokens(first, last, kind, width, beside, each)
    for index = 0, last - first do -- the widths of a family double
        TOKENS[first + index] = {kind, width and width * math.floor(2 ^ index) or 0, beside or 0, each}
    end
end
tokens(0xCC, 0xCF, "uint", 1)
tokens(0xC4, 0xC6, "bytes", 1)
tokens(0xC7, 0xC9, "bytes", 1, 1)
tokens(0xD9, 0xDB, "string", 1)
tokens(0xDC, 0xDD, "items", 2, 0, 1)
tokens(0xDE, 0xDF, "items", 2, 0, 2)
tokens(0xD0, 0xD3, "int", 1)
tokens(0xCA, 0xCB, "other", 4) -- floats
for first, size in pairs({[0xC0] = 0, [0xC2] = 0, [0xC3] = 0, [0xD4] = 2, [0xD5] = 3, [0xD6] = 5, [0xD7] = 9, [0xD8] = 17})
do
    tokens(first, first, "other", nil, size)
end

-- One token: its kind, its value (of items: how many follow) and where the next one begins; nil if there is none.
local function token(raw, pos)
    local first = string.byte(raw, pos)
    if not first then return nil end
    if first < 0x80 then return "uint", first, pos + 1 end
    if first < 0x90 then return "items", (first - 0x80) * 2, pos + 1 end
    if first < 0xA0 then return "items", first - 0x90, pos + 1 end
    if first >= 0xE0 then return "other", nil, pos + 1 end
    local kind, value, at, beside = "string", first - 0xA0, pos + 1, 0
    if first >= 0xC0 then
        if not TOKENS[first] then return nil end
        local width, each
        kind, width, beside, each = TOKENS[first][1], TOKENS[first][2], TOKENS[first][3], TOKENS[first][4]
        if #raw < at + width - 1 then return nil end
        value = 0
        for index = at, at + width - 1 do
            value = value * 256 + string.byte(raw, index)
        end
        value, at = value * (each or 1), at + width
    end
    if kind == "int" then kind = string.byte(raw, pos + 1) < 0x80 and "uint" or "other" end
    local stop = at + beside + ((kind == "string" or kind == "bytes") and value or 0)
    if stop > #raw + 1 then return nil end
    return kind, kind == "string" and string.sub(raw, at, stop - 1) or value, stop
end

-- The strings and unsigned integers of a map, as {value, first byte, last byte} each; nil if it is none.
local function string_map(raw)
    local first = string.byte(raw, 1)
    if not first or not (first >= 0x80 and first < 0x90 or first == 0xDE or first == 0xDF) then return nil end
    local _, count, pos = token(raw, 1)
    if not pos then return nil end
    local map = {}
    for _ = 1, count / 2 do
        local kind, key, at = token(raw, pos)
        if kind ~= "string" then return nil end
        local left, begin = 1, at
        while left > 0 do -- over the value, however deep; each token takes a byte, so this ends
            local value
            kind, value, pos = token(raw, at)
            if not kind then return nil end
            if begin == at and (kind == "string" or kind == "uint") then map[key] = {value, begin, pos - 1, kind} end
            left = left - 1 + (kind == "items" and value or 0)
            at = pos
        end
    end
    return pos == #raw + 1 and map or nil
end

-- Values --------------------------------------------------------------------------------------------------------------
--
-- Each reader adds a field to `node` and gives back what the value is, for the info column, and the field's item. No
-- range is ever empty, for Wireshark has none at the end of its data: an empty value has no field.

local read = {}

function read.u32(_, node, name, range)
    return range:uint(), node:add(fields[name], range)
end

read.u8, read.u16 = read.u32, read.u32

function read.code(_, node, name, range)
    local code = range:uint()
    local unknown = code >= 0x80000000 and "application code " or "unknown code "
    return CODES[code] or unknown .. string.format("%d", code), node:add(fields[name], range)
end

function read.u64(context, node, name, range)
    local item = node:add(fields[name], range)
    local high, low = range(0, 4):uint(), range(4, 4):uint()
    if name == "credit.max_offset" and high >= 0x80000000 then
        complain(context, item, "flow_control", "FLOW_CONTROL: a credit above 2^63 - 1")
    elseif name == "streams.max_opens" and (high > 0 or low > 0x80000000) then
        complain(context, item, "protocol", "PROTOCOL: a number of OPENs above 2^31")
    end
    return tostring(range:uint64()), item
end

function read.class(context, node, name, range)
    local value, item = read.u32(context, node, name, range)
    if not CLASSES[value] then
        complain(context, item, "protocol", "PROTOCOL: priority class " .. value .. "; there are 0, 1 and 2")
    end
    return CLASSES[value], item
end

function read.features(_, node, name, range)
    local item = node:add(fields[name], range)
    item:add(fields[name .. ".resume"], range)
    item:add(fields[name .. ".datagrams"], range)
    return range:uint(), item
end

function read.bytes(_, node, name, range)
    return nil, node:add(fields[name], range)
end

read.bytes16, read.bytes32 = read.bytes, read.bytes

function read.rest(context, node, name, range)
    context.values.size = range:len()
    return nil, node:add(fields[name], range)
end

function read.instance(context, node, name, range)
    local item = node:add(fields[name], range)
    if range:len() ~= 16 then
        complain(context, item, "protocol", "PROTOCOL: INSTANCE of " .. range:len() .. " bytes, not 16")
    end
    return nil, item
end

function read.words(_, node, name, range)
    local value = clean(range:raw())
    return value, node:add(fields[name], range, value)
end

function read.text(context, node, name, range)
    return ": " .. read.words(context, node, name, range)
end

function read.lines(_, node, name, range)
    local all = {}
    for begin, line, stop in string.gmatch(range:raw(), "()([^\n]+)()") do
        local value = clean(line)
        node:add(fields[name], range(begin - 1, stop - begin), value)
        table.insert(all, value)
    end
    return table.concat(all, ", ")
end

function read.magic(context, node, name, range)
    local value, item = read.words(context, node, name, range)
    if value ~= "KNK1" then
        complain(context, item, "protocol", "PROTOCOL: HELLO without the magic KNK1")
    end
    return value, item
end

-- A stream type's own header; that of an OPEN of `tcp` or `udp` is known. An ACCEPT does not say which type it is about.
function read.header(context, node, name, range)
    local item = node:add(fields[name], range)
    local kind = context.values.name
    if kind ~= "tcp" and kind ~= "udp" then return nil, item end
    local map = string_map(range:raw())
    local host, port = map and map.host, map and map.port
    if not (host and host[4] == "string" and #host[1] >= 1 and port and port[4] == "uint"
            and port[1] >= 1 and port[1] <= MAX_PAYLOAD) then
        item:add_proto_expert_info(experts.malformed_header, "The header is not a MessagePack map with a host and a port")
        return nil, item
    end
    local cleaned = clean(host[1])
    item:add(fields["open." .. kind .. ".host"], range(host[2] - 1, host[3] - host[2] + 1), cleaned)
    item:add(fields["open." .. kind .. ".port"], range(port[2] - 1, port[3] - port[2] + 1), port[1])
    local target = (string.find(cleaned, ":", 1, true) and "[" .. cleaned .. "]:" or cleaned .. ":") .. port[1]
    context.values.target = " " .. target
    return target, item
end

-- The rest of a frame as TLVs.
local function read_tlvs(context, node, name, range, known)
    local pos, stop, seen = 0, range:len(), {}
    while pos < stop do
        if stop - pos < 4 then
            local item = node:add(fields.undecoded, range(pos))
            complain(context, item, "frame_size", "FRAME_SIZE: a TLV is cut off by the end of its frame")
            return
        end
        local id, length = range(pos, 2):uint(), range(pos + 2, 2):uint()
        local over = length > stop - pos - 4
        local item = node:add(fields[name], range(pos, over and stop - pos or 4 + length))
        local tlv = known[id]
        local title = tlv and tlv[1] or string.format("0x%04x", id)
        item:set_text(title)
        item:add(fields[name .. ".id"], range(pos, 2))
        item:add(fields[name .. ".length"], range(pos + 2, 2))
        if over then
            complain(context, item, "frame_size", "FRAME_SIZE: " .. title .. " runs over the end of its frame")
            return
        end
        if seen[id] then
            complain(context, item, "protocol", "PROTOCOL: " .. title .. " came twice")
        end
        seen[id] = true
        local value = length > 0 and range(pos + 4, length) or nil
        if not tlv then
            if value then item:add(fields[name .. ".value"], value) end
            if known == PARAMETERS and id % 2 == 1 then
                item:add_proto_expert_info(experts.critical_tlv)
            elseif id % 16 == 10 and math.floor(id / 256) % 16 == 10 then
                item:append_text(" (GREASE)")
            else
                item:add_proto_expert_info(experts.unknown_tlv)
            end
        elseif KINDS[tlv[3]][1] and KINDS[tlv[3]][1] ~= length then
            complain(context, item, "protocol",
                string.format("PROTOCOL: %s of %d bytes, not %d", title, length, KINDS[tlv[3]][1]))
            if value then item:add(fields[name .. ".value"], value) end
        elseif value then
            local shown = read[tlv[3]](context, item, context.prefix .. tlv[2], value)
            if shown then item:append_text(": " .. shown) end
            if tlv.floor and shown < tlv.floor then
                complain(context, item, "protocol",
                    string.format("PROTOCOL: %s is %d, below its floor %d", title, shown, tlv.floor))
            end
            if known == SETTINGS and tlv[1] == "NAME" then context.values.endpoint = " " .. shown end
        end
        pos = pos + 4 + length
    end
end

-- A stream type's name behind its length: what it is, and how many bytes both took; nil if it is cut off.
local function read_name(context, node, name, range)
    local length = range(0, 1):uint()
    local item = node:add(fields[name .. "_length"], range(0, 1))
    if length > range:len() - 1 then
        complain(context, item, "frame_size", "FRAME_SIZE: OPEN is cut off in its type name")
        return nil
    end
    local raw = length > 0 and range(1, length):raw() or ""
    if length > 0 then item = node:add(fields[name], range(1, length), clean(raw)) end
    if not string.find(raw, "^[!-~]+$") then
        complain(context, item, "protocol", "PROTOCOL: OPEN with a type name that is not printable ASCII")
    end
    return clean(raw), 1 + length
end

-- Frames --------------------------------------------------------------------------------------------------------------

-- The payload of a frame whose length fits its type.
local function read_payload(context, node, frame, range)
    local pos, stop, values = 0, range:len(), context.values
    for _, part in ipairs(frame) do
        if pos == stop then break end
        local name, kind = frame.prefix .. part[1], part[2]
        if kind == "tlvs" then
            read_tlvs(context, node, name, range(pos), part[4])
            break
        end
        local size = KINDS[kind][1] or stop - pos
        if kind == "name" then
            values.name, size = read_name(context, node, name, range(pos))
            if not size then break end
        else
            values[part[1]] = read[kind](context, node, name, range(pos, size))
        end
        pos = pos + size
    end
    if frame.name == "HELLO" and values.vmin > values.vmax then
        complain(context, node, "protocol",
            string.format("PROTOCOL: HELLO with versions from %d down to %d", values.vmin, values.vmax))
    end
end

-- What is wrong with a header, whatever its payload: a kind and a sentence, or nil.
local function judge(kind, flags, length, stream)
    local frame = FRAMES[kind]
    if not frame then
        if kind < 0x80 then return "protocol", string.format("unknown frame type 0x%02x", kind) end
        return nil
    end
    local name = frame.name
    if flags > (frame.flags or 0) then
        return "protocol", string.format("%s with undefined flags 0x%02x", name, flags - flags % ((frame.flags or 0) + 1))
    end
    if frame.on_stream and stream == 0 then return "protocol", name .. " on the session" end
    if not frame.on_stream and stream ~= 0 then return "protocol", string.format("%s on stream %d", name, stream) end
    if length < frame.least or length > frame.most then
        return "frame_size", string.format("%s of %d bytes; it has %d to %d", name, length, frame.least, frame.most)
    end
    if name == "DATA" and flags == 3 then return "protocol", "DATA with FIN and BLOCKED together" end
    if name == "DATA" and flags == 0 and length == 0 then
        return "protocol", "empty DATA with neither FIN nor BLOCKED"
    end
    return nil
end

-- One frame, or as much of it as the range has, as a subtree; what the info column says of it.
local function read_frame(tree, range)
    local kind, flags = range(0, 1):uint(), range(1, 1):uint()
    local length, stream = range(2, 2):uint(), range(4, 4):uint()
    local frame = FRAMES[kind]
    local node = tree:add(fields.frame, range)
    local context = {values = {size = 0}, prefix = frame and frame.prefix}
    if kind == 0 then context.values.flags = ({[1] = " FIN", [2] = " BLOCKED"})[flags] end

    local type_item = node:add(fields.type, range(0, 1))
    type_item:add(fields["type.ignorable"], range(0, 1))
    type_item:add(fields["type.unsequenced"], range(0, 1))
    local flags_item = node:add(fields.flags, range(1, 1))
    if kind == 0 then
        flags_item:add(fields["flags.fin"], range(1, 1))
        flags_item:add(fields["flags.blocked"], range(1, 1))
    end
    node:add(fields.length, range(2, 2))
    node:add(fields.stream, range(4, 4))

    local error, why = judge(kind, flags, length, stream)
    if error then complain(context, node, error, string.upper(error) .. ": " .. why) end
    local whole = range:len() == HEADER_SIZE + length
    local summary
    if frame and whole and length >= frame.least and length <= frame.most then -- whatever else is wrong
        if length > 0 then read_payload(context, node, frame, range(HEADER_SIZE)) end
        summary = string.gsub(frame.info, "{([%w_]+)}", function(value) return tostring(context.values[value] or "") end)
    else
        if range:len() > HEADER_SIZE then node:add(fields.undecoded, range(HEADER_SIZE)) end
        if not frame and kind >= 0x80 then node:add_proto_expert_info(experts.unknown_frame) end
        if not whole then node:add_proto_expert_info(experts.truncated) end
    end

    local label = frame and frame.name or string.format("0x%02x", kind)
    if stream ~= 0 then label = label .. string.format("[%d]", stream) end
    if context.error then
        summary = "(" .. context.error .. ")"
    elseif not whole then
        summary = "(cut off)"
    end
    if summary and summary ~= "" then label = label .. " " .. summary end
    node:set_text(label)
    return label
end

-- The stream of bytes -------------------------------------------------------------------------------------------------

-- A packet may hold several TLS records, and this is called for each.
local function show_info(pinfo, labels)
    if #labels == 0 then return end
    local shown = pinfo.private["konnektor.info"]
    local length = tonumber(shown or 0)
    local text = (shown and ", " or "") .. table.concat(labels, ", ")
    pinfo.cols.info:clear() -- what TLS says of the record; what we said of earlier ones is fenced off
    if length < MAX_INFO then
        if length + #text > MAX_INFO then text = string.sub(text, 1, MAX_INFO - length) .. "..." end
        pinfo.cols.info:append(clean(text))
        pinfo.cols.info:fence()
    end
    pinfo.private["konnektor.info"] = tostring(length + #text)
end

function konnektor.dissector(tvb, pinfo, tree)
    local stop, pos = tvb:len(), 0
    if stop == 0 then return 0 end
    pinfo.cols.protocol = "konnektor"
    local can_wait = pinfo.can_desegment > 0 and tvb:reported_len() == stop
    local root, labels = nil, {}
    local function show(size)
        root = root or tree:add(konnektor, tvb(pos))
        table.insert(labels, read_frame(root, tvb(pos, size)))
    end

    while pos < stop do
        local left = stop - pos
        local size = left >= HEADER_SIZE and HEADER_SIZE + tvb(pos + 2, 2):uint() or nil
        if not size or size > left then
            if size and (not can_wait or judge(tvb(pos, 1):uint(), tvb(pos + 1, 1):uint(), size - HEADER_SIZE,
                                               tvb(pos + 4, 4):uint())) then
                -- A header that can only be wrong is shown at once, as a receiver answers it at once; and again with
                -- its payload. (Only where packets are seen once: in Wireshark's window it waits for the payload.)
                show(left)
            elseif not can_wait then
                root = root or tree:add(konnektor, tvb(pos))
                root:add(fields.undecoded, tvb(pos)):add_proto_expert_info(experts.truncated)
            end
            if can_wait then
                pinfo.desegment_offset = pos
                pinfo.desegment_len = size and size - left or DESEGMENT_ONE_MORE_SEGMENT
            end
            break
        end
        show(size)
        pos = pos + size
    end
    show_info(pinfo, labels)
    return stop
end

-- Where it is used ----------------------------------------------------------------------------------------------------

DissectorTable.get("tls.alpn"):add(ALPN, konnektor)

-- Without TLS, as konnektor.testing or another implementation's tests may run it: "Decode As", or a port.
local tcp_ports = DissectorTable.get("tcp.port")
tcp_ports:add_for_decode_as(konnektor)
konnektor.prefs.tcp_port = Pref.uint("TCP port without TLS", 0, "Where the protocol runs in plaintext; 0: nowhere")

local current = 0
function konnektor.prefs_changed()
    if current == konnektor.prefs.tcp_port then return end
    if current ~= 0 then tcp_ports:remove(current, konnektor) end
    current = konnektor.prefs.tcp_port
    if current ~= 0 then tcp_ports:add(current, konnektor) end
end
