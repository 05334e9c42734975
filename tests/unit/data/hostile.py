"""Lines that are wrong in one way each, with the reason they must get; and lines that only look wrong.

A line is (name, bytes, reason). `chat` and `turns` splice raw JSON, because most of these lines no writer would write.
"""

from __future__ import annotations

from luthier.data.parse import MAX_LINE_BYTES

_USER = '{"role":"user","content":"a"}'
_ANSWER = '{"role":"assistant","content":"b"}'
_CALLS = '{"role":"assistant","content":null,"tool_calls":[{"id":"1","function":{"name":"f","arguments":"{}"}}]}'


def turns(*messages: str, beside: str = "") -> bytes:
    """A chat row of raw messages, and raw keys beside them."""
    return f'{{"messages":[{",".join(messages)}]{beside}}}'.encode()


def chat(user: str = '"a"', answer: str = '"b"', beside: str = "") -> bytes:
    """A chat row of two turns whose contents are raw JSON."""
    return turns(f'{{"role":"user","content":{user}}}', f'{{"role":"assistant","content":{answer}}}', beside=beside)


def answered(extra: str) -> bytes:
    """A chat row whose answer carries more raw keys."""
    return turns(_USER, f'{{"role":"assistant","content":"b",{extra}}}')


def called(arguments: str) -> bytes:
    """A chat row that ends in a call of a tool with these raw arguments."""
    return answered(f'"tool_calls":[{{"id":"1","function":{{"name":"f","arguments":{arguments}}}}}]')


def asked(role: str) -> bytes:
    """A chat row whose first role is this raw JSON."""
    return turns(f'{{"role":{role},"content":"a"}}', _ANSWER)


def nested(levels: int, inner: str = "1") -> bytes:
    """A good row of so many levels."""
    deeper = levels - 1
    return chat(beside=f',"meta":{"[" * deeper}{inner}{"]" * deeper}')


_OTHER_USER = _USER.replace('"a"', '"c"')
_RESULT = '{"role":"tool","content":"r","tool_call_id":"1"}'
_STRAY = '{"role":"tool","content":"r","tool_call_id":"2"}'

HOSTILE: list[tuple[str, bytes, str]] = [
    # -- not JSON
    ("words", b"hello there", "not_json"),
    ("truncated", chat()[:-9], "not_json"),
    ("truncated in a string", b'{"text": "abc', "not_json"),
    ("trailing comma", chat(beside=","), "not_json"),
    ("comma in a list", b'{"messages":[' + _USER.encode() + b",]}", "not_json"),
    ("single quotes", b"{'text': 'a'}", "not_json"),
    ("no quotes", b"{text: 1}", "not_json"),
    ("Python words", b'{"text": None, "done": True}', "not_json"),
    ("comment", b'{"text": "a"} // good', "not_json"),
    ("two rows on a line", chat() + chat(), "not_json"),
    ("raw tab in a string", b'{"text": "a\tb"}', "not_json"),
    ("raw escape in a string", b'{"text": "\x1b[31m"}', "not_json"),
    ("bad escape", b'{"text": "\\x41"}', "not_json"),
    ("half an escape", b'{"text": "\\u00"}', "not_json"),
    ("leading zero", chat(beside=',"n":007'), "not_json"),
    ("hexadecimal", chat(beside=',"n":0x10'), "not_json"),
    ("leading plus", chat(beside=',"n":+1'), "not_json"),
    ("vertical tab around", b"\x0b" + chat(), "not_json"),
    ("no-break space around", "\u00a0".encode() + chat(), "not_json"),
    ("CSV", b"prompt,completion", "not_json"),
    ("XML", b"<row/>", "not_json"),
    # -- JSON, and not an object
    ("array", b"[1, 2]", "not_an_object"),
    ("array of rows", b"[" + chat() + b"]", "not_an_object"),
    ("text", b'"hello"', "not_an_object"),
    ("number", b"3.5", "not_an_object"),
    ("null", b"null", "not_an_object"),
    ("boolean", b"true", "not_an_object"),
    # -- bytes that are no text
    ("Latin-1", '{"text": "caf\u00e9"}'.encode("latin-1"), "bad_utf8"),
    ("Windows quotes", b'{"text": "\x93hi\x94"}', "bad_utf8"),
    ("overlong", b'{"text": "\xc0\xaf"}', "bad_utf8"),
    ("lone continuation", b'{"text": "\x80"}', "bad_utf8"),
    ("cut character", b'{"text": "\xf0\x9f\x98"}', "bad_utf8"),
    ("beyond Unicode", b'{"text": "\xf4\x90\x80\x80"}', "bad_utf8"),
    ("surrogate as bytes", b'{"text": "\xed\xa0\x80"}', "bad_utf8"),
    ("emoji as two surrogates", b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}', "bad_utf8"),
    ("bad key", b'{"te\xffxt": "a"}', "bad_utf8"),
    ("UTF-16", "\ufeff{}".encode("utf-16-le"), "bad_utf8"),
    ("mark before the row", b"\xef\xbb\xbf" + chat(), "bom"),
    ("mark and nothing", b"\xef\xbb\xbf", "bom"),
    ("raw NUL", b'{"text": "a\x00b"}', "nul"),
    ("NUL for the row", b"\x00\x00\x00", "nul"),
    ("escaped NUL", b'{"text": "a\\u0000b"}', "nul"),
    ("NUL in a key", chat(beside=',"a\\u0000":1'), "nul"),
    ("NUL in a deep list", nested(9, '"\\u0000"'), "nul"),
    ("NUL in arguments", called('"{\\"a\\":\\"\\\\u0000\\"}"'), "nul"),
    ("high half", b'{"text": "a\\ud83d"}', "lone_surrogate"),
    ("low half", b'{"text": "\\ude00b"}', "lone_surrogate"),
    ("halves swapped", b'{"text": "\\ude00\\ud83d"}', "lone_surrogate"),
    ("half in a key", b'{"text": "a", "\\ud83d": 1}', "lone_surrogate"),
    ("half in arguments", called('"{\\"a\\":\\"\\\\ud83d\\"}"'), "lone_surrogate"),
    # -- numbers
    ("NaN", chat(beside=',"score":NaN'), "non_finite_number"),
    ("Infinity", chat(beside=',"score":Infinity'), "non_finite_number"),
    ("minus Infinity", chat(beside=',"score":[-Infinity]'), "non_finite_number"),
    ("1e999", chat(beside=',"score":1e999'), "non_finite_number"),
    ("-1e999", chat(beside=',"score":-1e999'), "non_finite_number"),
    ("400 digits", chat(beside=f',"score":{"9" * 400}'), "non_finite_number"),
    ("5000 digits", chat(beside=f',"score":{"9" * 5000}'), "non_finite_number"),
    ("65 bits in arguments", called('"{\\"a\\":18446744073709551616}"'), "non_finite_number"),
    ("65 bits in arguments that are an object", called('{"a":[-9223372036854775809]}'), "non_finite_number"),
    ("NaN in arguments", called('"{\\"a\\":NaN}"'), "non_finite_number"),
    # -- keys named twice
    ("text twice", b'{"text": "a", "text": "b"}', "duplicate_key"),
    ("messages twice", chat(beside=f',"messages":[{_USER},{_ANSWER}]'), "duplicate_key"),
    ("role twice", turns('{"role":"user","role":"system","content":"a"}', _USER, _ANSWER), "duplicate_key"),
    ("role twice, escaped", turns('{"role":"user","\\u0072ole":"system","content":"a"}', _ANSWER), "duplicate_key"),
    ("content twice", chat('"a","content":"b"'), "duplicate_key"),
    ("content twice, quotes escaped", chat('"\\u0022","content":"b"'), "duplicate_key"),
    ("weight twice", answered('"weight":0,"weight":1'), "duplicate_key"),
    ("twice in what nobody reads", chat(beside=',"meta":{"a":1,"a":1}'), "duplicate_key"),
    ("empty key twice", chat(beside=',"":1,"":2'), "duplicate_key"),
    ("twice in arguments", called('"{\\"path\\":\\"a\\",\\"path\\":\\"b\\"}"'), "duplicate_key"),
    (
        "role twice in a list kept as text",
        b'{"conversations":"[{\\"from\\":\\"human\\",\\"from\\":\\"system\\",\\"value\\":\\"a\\"}]"}',
        "duplicate_key",
    ),
    # -- depth and length
    ("33 levels", nested(33), "too_deep"),
    ("33 levels far behind", chat(f'"{"a" * 5000}"', beside=f',"m":{"[" * 32}{"]" * 32}'), "too_deep"),
    ("600 levels with a NUL", nested(600, '"\\u0000"'), "too_deep"),
    ("900 levels", nested(900), "too_deep"),
    ("100000 lists", b"[" * 100_000, "too_deep"),
    ("100000 objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too_deep"),
    ("300 levels in arguments", called(f'"{{\\"a\\":{"[" * 300}{"]" * 300}}}"'), "too_deep"),
    ("more than 8 MiB", b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}', "line_too_long"),
    # -- keys of no format
    ("empty object", b"{}", "unknown_format"),
    ("question and answer", b'{"question": "a", "answer": "b"}', "unknown_format"),
    ("capital letter", b'{"Messages": []}', "unknown_format"),
    ("misspelt messages", b'{"mesages": []}', "unknown_format"),
    ("error of a service", b'{"error": {"code": 429}}', "unknown_format"),
    # -- keys missing, values of another type
    ("no messages in it", turns(), "missing_key"),
    ("alpaca without output", b'{"instruction": "a", "input": ""}', "missing_key"),
    ("no role", turns('{"content":"a"}', _ANSWER), "missing_key"),
    ("no from", b'{"conversations":[{"value":"a"}]}', "missing_key"),
    ("OpenAI pair without input", b'{"preferred_output":[],"non_preferred_output":[]}', "missing_key"),
    ("pair that shares no prompt", b'{"chosen":[' + _USER.encode() + b'],"rejected":[]}', "missing_key"),
    ("messages is text", b'{"messages": "a"}', "wrong_type"),
    ("messages is null", b'{"messages": null}', "wrong_type"),
    ("messages is an object", b'{"messages": {"role": "user"}}', "wrong_type"),
    ("message is text", turns('"a"', _ANSWER), "wrong_type"),
    ("message is null", turns("null", _ANSWER), "wrong_type"),
    ("message is a list", turns('["user","a"]', _ANSWER), "wrong_type"),
    ("content is a number", chat("42"), "wrong_type"),
    ("content is an object", chat('{"text":"a"}'), "wrong_type"),
    ("content is a boolean", chat(answer="false"), "wrong_type"),
    ("text is a list", b'{"text": ["a"]}', "wrong_type"),
    ("prompt is a number", b'{"prompt": 1, "completion": "a"}', "wrong_type"),
    ("system is a list", b'{"instruction":"a","output":"b","system":["c"]}', "wrong_type"),
    ("history of objects", b'{"instruction":"a","output":"b","history":[{"user":"a"}]}', "wrong_type"),
    ("history of threes", b'{"instruction":"a","output":"b","history":[["a","b","c"]]}', "wrong_type"),
    ("history is text", b'{"instruction":"a","output":"b","history":"earlier"}', "wrong_type"),
    ("list kept as text is no JSON", b'{"conversations":"[{]"}', "wrong_type"),
    ("chosen is null", b'{"prompt":"a","chosen":null,"rejected":"b"}', "wrong_type"),
    ("thinking is a list", answered('"reasoning_content":["a"]'), "wrong_type"),
    # -- roles
    ("asistant", turns(_USER, '{"role":"asistant","content":"b"}'), "unknown_role"),
    ("User", asked('"User"'), "unknown_role"),
    ("user and a space", asked('"user "'), "unknown_role"),
    ("cyrillic es in system", asked('"\u0441ystem"'), "unknown_role"),
    ("role is a number", asked("1"), "unknown_role"),
    ("role is null", asked("null"), "unknown_role"),
    ("role is a list", asked('["user"]'), "unknown_role"),
    ("role is an object", asked('{"user":1}'), "unknown_role"),
    ("human in chat", asked('"human"'), "unknown_role"),
    ("narrator in ShareGPT", b'{"conversations":[{"from":"narrator","value":"a"}]}', "unknown_role"),
    # -- order
    ("assistant first", turns(_ANSWER), "wrong_order"),
    ("two users", turns(_USER, _USER, _ANSWER), "wrong_order"),
    ("two answers", turns(_USER, _ANSWER, _ANSWER), "wrong_order"),
    ("system in the middle", turns(_USER, '{"role":"system","content":"s"}', _ANSWER), "wrong_order"),
    ("two systems", turns(*['{"role":"system","content":"s"}'] * 2, _USER, _ANSWER), "wrong_order"),
    ("tool after the user", turns(_USER, _RESULT, _ANSWER), "wrong_order"),
    ("answer after the system", turns('{"role":"developer","content":"s"}', _ANSWER), "wrong_order"),
    ("only a system", turns('{"role":"system","content":"s"}'), "no_assistant"),
    ("only a user", turns(_USER), "no_assistant"),
    ("ends with the user", turns(_USER, _ANSWER, _OTHER_USER), "last_not_assistant"),
    ("ends with a result", turns(_USER, _CALLS, _RESULT), "last_not_assistant"),
    (
        "pair ends with the user",
        f'{{"prompt":"a","chosen":[{_ANSWER},{_USER}],"rejected":"c"}}'.encode(),
        "last_not_assistant",
    ),
    # -- nothing said
    ("empty user", chat('""'), "empty_content"),
    ("empty answer", chat(answer='""'), "empty_content"),
    ("answer of spaces", chat(answer='" \\n\\t"'), "empty_content"),
    ("answer of wide spaces", chat(answer='"\\u3000\\u00a0"'), "empty_content"),
    ("answer is null", chat(answer="null"), "empty_content"),
    ("no content", turns(_USER, '{"role":"assistant"}'), "empty_content"),
    ("misspelt content", turns(_USER, '{"role":"assistant","contents":"b"}'), "misspelt_key"),
    ("misspelt weight", turns(_USER, '{"role":"assistant","content":"b","wieght":0}'), "misspelt_key"),
    ("no parts", chat("[]"), "empty_content"),
    ("empty parts", chat('[{"type":"text","text":""}]'), "empty_content"),
    ("empty text", b'{"text": ""}', "empty_content"),
    ("blank text", b'{"text": " \\n "}', "empty_content"),
    ("empty output", b'{"instruction":"a","output":""}', "empty_content"),
    ("empty completion", b'{"prompt":"a","completion":""}', "empty_content"),
    ("empty chosen", b'{"prompt":"a","chosen":[],"rejected":"b"}', "empty_content"),
    # -- not text
    ("image", chat('[{"type":"image_url","image_url":{"url":"x"}}]'), "not_text"),
    ("audio beside text", chat('[{"type":"text","text":"a"},{"type":"input_audio"}]'), "not_text"),
    ("part without type", chat('[{"text":"a"}]'), "not_text"),
    ("part is text", chat('["a"]'), "not_text"),
    ("text part without text", chat('[{"type":"text"}]'), "not_text"),
    # -- tools
    ("function_call", answered('"function_call":{"name":"f","arguments":"{}"}'), "bad_tool_call"),
    ("user calls a tool", turns('{"role":"user","content":"a","tool_calls":[{}]}', _ANSWER), "bad_tool_call"),
    ("tool_calls is an object", answered('"tool_calls":{"name":"f"}'), "bad_tool_call"),
    ("call is a number", answered('"tool_calls":[1]'), "bad_tool_call"),
    ("call without a name", answered('"tool_calls":[{"function":{"arguments":"{}"}}]'), "bad_tool_call"),
    ("name is a number", answered('"tool_calls":[{"function":{"name":1}}]'), "bad_tool_call"),
    ("arguments are no JSON", called('"{a: 1}"'), "bad_tool_call"),
    ("arguments are a list", called("[1]"), "bad_tool_call"),
    ("arguments are text of a list", called('"[1]"'), "bad_tool_call"),
    ("arguments are null", called("null"), "bad_tool_call"),
    ("tools is an object", chat(beside=',"tools":{"name":"f"}'), "bad_tool_call"),
    ("tools of names", chat(beside=',"tools":["f"]'), "bad_tool_call"),
    ("result without a call", turns(_USER, _ANSWER, _RESULT, _ANSWER), "unmatched_tool_call"),
    ("result of another call", turns(_USER, _CALLS, _STRAY, _ANSWER), "unmatched_tool_call"),
    ("result given twice", turns(_USER, _CALLS, _RESULT, _RESULT, _ANSWER), "unmatched_tool_call"),
    ("call never answered", turns(_USER, _CALLS, _OTHER_USER, _ANSWER), "unmatched_tool_call"),
    # -- weights
    ("weight 0.5", answered('"weight":0.5'), "bad_weight"),
    ("weight 2", answered('"weight":2'), "bad_weight"),
    ("weight -1", answered('"weight":-1'), "bad_weight"),
    ("weight true", answered('"weight":true'), "bad_weight"),
    ("weight as text", answered('"weight":"0"'), "bad_weight"),
    ("weight is a list", answered('"weight":[0]'), "bad_weight"),
    ("weight on the user", turns('{"role":"user","content":"a","weight":1}', _ANSWER), "bad_weight"),
    # -- pairs
    ("equal answers", b'{"prompt":"a","chosen":"b","rejected":"b"}', "chosen_equals_rejected"),
    (
        "equal answers, one as messages",
        f'{{"prompt":"a","chosen":"b","rejected":[{_ANSWER}]}}'.encode(),
        "chosen_equals_rejected",
    ),
    (
        "prompt without a user",
        b'{"prompt":[{"role":"system","content":"s"}],"chosen":"b","rejected":"c"}',
        "wrong_order",
    ),
]

# The contents that must stand in the Example, in their order, exactly as they stand in the line.
HARMLESS: list[tuple[str, bytes, list[str]]] = [
    (
        "emoji",
        chat('"\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467"'),
        ["\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467", "b"],
    ),
    ("emoji escaped", chat('"\\ud83d\\ude00"'), ["\U0001f600", "b"]),
    (
        "right to left",
        chat('"\u0645\u0631\u062d\u0628\u0627 \u202e abc"'),
        ["\u0645\u0631\u062d\u0628\u0627 \u202e abc", "b"],
    ),
    ("not composed", chat('"e\u0301"'), ["e\u0301", "b"]),
    ("wide letters", chat('"\uff21\uff22"'), ["\uff21\uff22", "b"]),
    ("32 levels", nested(32), ["a", "b"]),
    ("escaped quotes", chat('"\\"role\\": \\"system\\""'), ['"role": "system"', "b"]),
    ("quotes as u0022", chat('"\\u0022x\\u0022"'), ['"x"', "b"]),
    ("a row in a text", chat(r'"{\"role\":\"user\",\"role\":\"system\"}"'), ['{"role":"user","role":"system"}', "b"]),
    ("backslash u0000", chat('"\\\\u0000"'), ["\\u0000", "b"]),
    ("words NaN and Infinity", chat('"NaN"', '"Infinity"'), ["NaN", "Infinity"]),
    ("brackets in a text", chat(f'"{"[{" * 40}"'), ["[{" * 40, "b"]),
    ("thinking", chat(answer='"<think>\\nhm\\n</think>\\n\\nb"'), ["a", "<think>\nhm\n</think>\n\nb"]),
    ("tool call spelt out", chat(answer='"<tool_call>{}</tool_call>"'), ["a", "<tool_call>{}</tool_call>"]),
    ("HTML", chat('"<script>alert(1)</script>&amp;"'), ["<script>alert(1)</script>&amp;", "b"]),
    ("template code", chat('"{{ messages }}{% endif %}"'), ["{{ messages }}{% endif %}", "b"]),
    ("edge white space", chat('"  a\\n"', '"\\tb "'), ["  a\n", "\tb "]),
    ("Windows line end", chat() + b"\r", ["a", "b"]),
    ("spaces around", b"  " + chat() + b"\t", ["a", "b"]),
    ("line separators", chat('"a\u2028b\u0085c"'), ["a\u2028b\u0085c", "b"]),
    ("private use", chat('"\ue000\uf8ff"'), ["\ue000\uf8ff", "b"]),
    ("mark inside a text", chat('"\ufeffa"'), ["\ufeffa", "b"]),
    ("escape characters", chat('"\\u001b[31m\\u007f"'), ["\x1b[31m\x7f", "b"]),
    ("a MiB", chat(f'"{"x" * (1 << 20)}"'), ["x" * (1 << 20), "b"]),
    ("same key in two objects", chat(beside=',"a":{"b":1},"c":{"b":1}'), ["a", "b"]),
    ("keys nobody knows", chat(beside=',"id":"7","source":null'), ["a", "b"]),
    ("weight 1", turns(_USER, '{"role":"assistant","content":"1","weight":1}'), ["a", "1"]),
]
