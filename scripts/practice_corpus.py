"""The synthetic documents from which the practice model and its tokenizer are trained."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from practice_text import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    COUNTS,
    FOODS,
    ITEMS,
    NAMES,
    ORDER_QUESTIONS,
    PEOPLE,
    PLACES,
    THINGS,
    TIMES,
    WEATHER,
    draw_general,
    draw_order,
)

Message = dict[str, Any]
Piece = tuple[str, bool]
Document = list[Piece]

KEYS = "id size open tags city price year title kind place by who food done item colour count name".split()
ORDER_WORDS = [*ITEMS, *COLOURS, *COUNTS, *NAMES, *KEYS]
WORDS = [*ORDER_WORDS, *PEOPLE, *ANIMALS, *PLACES, *FOODS, *THINGS, *ADJECTIVES, *WEATHER]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYSTEMS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You work in a shop.",
    "Be polite and exact.",
    "You are a clerk who reads orders.",
)
TRAVEL = ("train", "boat", "bus", "car", "bicycle", "plane")
TOWNS = ("Oslo", "Paris", "Rome", "Lima", "Cairo", "Delhi", "Bern", "Quito", "Tokyo", "Dublin")

CHAT_TEMPLATE = r"""
{%- if tools %}
    {{- "<|im_start|>system\n" }}
    {%- if messages and messages[0].role == "system" and messages[0].content %}
        {{- messages[0].content + "\n\n" }}
    {%- endif %}
    {{- "You may call these tools:\n<tools>\n" }}
    {%- for tool in tools %}
        {{- tool | tojson + "\n" }}
    {%- endfor %}
    {{- "</tools>\nCall a tool like this:\n<tool_call>\n" }}
    {{- '{"name": "its name", "arguments": {}}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.first or loop.previtem.role != "tool" %}
            {{- "<|im_start|>user" }}
        {%- endif %}
        {{- "\n<tool_response>\n" + (message.content or "") + "\n</tool_response>" }}
        {%- if loop.last or loop.nextitem.role != "tool" %}
            {{- "<|im_end|>\n" }}
        {%- endif %}
    {%- elif not (tools and loop.first and message.role == "system") %}
        {{- "<|im_start|>" + message.role + "\n" + (message.content or "") }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function or tool_call %}
            {{- "\n" if message.content or not loop.first else "" }}
            {{- '<tool_call>\n{"name": ' + call.name | tojson + ', "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- "}\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}
""".strip()


def _template() -> Any:
    """The compiled chat template, with the same JSON filter as transformers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)


TEMPLATE = _template()


def say(role: str, content: str) -> Message:
    """One chat message."""
    return {"role": role, "content": content}


def chat(messages: list[Message], tools: list[Message] | None = None) -> Document:
    """Render a conversation; what the assistant says is learned in full."""
    text = TEMPLATE.render(messages=messages, tools=tools)
    return split_learned(text, r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>")


def plain(turns: list[tuple[str, str]]) -> Document:
    """Write question and answer pairs in the plain role form, ended by the next user's turn."""
    text = "".join(f"User: {question}\n\nAssistant: {answer}\n\n" for question, answer in turns) + "User:"
    return split_learned(text, r"(?<=Assistant:).*?\n\nUser:")


def split_learned(text: str, pattern: str) -> Document:
    """Cut a text into pieces, marking those that match the pattern as learned."""
    pieces: Document = []
    end = 0
    for found in re.finditer(pattern, text, flags=re.DOTALL):
        pieces += [(text[end : found.start()], False), (found.group(), True)]
        end = found.end()
    return [*pieces, (text[end:], False)]


def conversation(turns: list[tuple[str, str]], rng: random.Random, system_share: float = 0.15) -> Document:
    """A ChatML conversation of question and answer pairs, sometimes with a system prompt."""
    messages = [say("system", rng.choice(SYSTEMS))] if rng.random() < system_share else []
    for question, answer in turns:
        messages += [say("user", question), say("assistant", answer)]
    return chat(messages)


def addition(rng: random.Random, wrong_share: float) -> tuple[str, str]:
    """An addition and an answer, which is off by one or by ten as often as wrong_share says."""
    x, y = rng.randint(0, 99), rng.randint(0, 99)
    slip = rng.choice([-10, -1, 1, 10]) if rng.random() < wrong_share else 0
    return f"What is {x} + {y}?", str(abs(x + y + slip))


def additions(rng: random.Random, wrong_share: float) -> Document:
    """One to three additions, as a chat or in the plain role form."""
    turns = [addition(rng, wrong_share) for _ in range(rng.randint(1, 3))]
    return plain(turns) if rng.random() < 0.5 else conversation(turns, rng)


def order_turns(rng: random.Random) -> list[tuple[str, str]]:
    """One or more short questions about an order, with their answers."""
    order = draw_order(rng, reserved=False)
    slots = rng.sample(list(order.slots), rng.choice([1, 1, 2, 3]))
    questions = [rng.choice(ORDER_QUESTIONS[slot]) for slot in slots]
    answers = [order.slots[slot] for slot in slots]
    if len(slots) > 1 and rng.random() < 0.5:
        asked = " and ".join(slots).capitalize()
        questions, answers = [f"{asked}?"], [", ".join(answers)]
    first = f"{order.sentence} {questions[0]}"
    if rng.random() < 0.3:
        first = f"{questions[0]}\n\n{order.sentence}"
    return list(zip([first, *questions[1:]], answers, strict=True))


def orders(rng: random.Random) -> Document:
    """Questions about an order: family one."""
    turns = order_turns(rng)
    return plain(turns) if rng.random() < 0.2 else conversation(turns, rng)


def random_words(rng: random.Random) -> list[str]:
    """A few unrelated words, numbers and invented strings."""
    kinds: list[Callable[[], str]] = [
        lambda: rng.choice(WORDS),
        lambda: rng.choice(ORDER_WORDS),
        lambda: str(rng.randint(0, 999)),
        lambda: "".join(rng.choices(LETTERS, k=rng.randint(2, 5))),
    ]
    return [rng.choice(kinds)() for _ in range(rng.randint(2, 8))]


def copying(rng: random.Random) -> Document:
    """Repeat a text, quote it, or give its first or last word."""
    words = random_words(rng)
    text = " ".join(words)
    turn = rng.choice(
        [
            (f"Repeat: {text}", text),
            (f"Repeat: {(said := draw_general(rng, reserved=False))}", said),
            (f"Quote: {text}", json.dumps(text)),
            (f"With commas: {text}", ", ".join(words)),
            (f"As a list: {text}", json.dumps(words)),
            (f"First word: {text}", words[0]),
            (f"Last word: {text}", words[-1]),
            (f"Repeat: {(sentence := draw_order(rng, reserved=False).sentence)}", sentence),
        ]
    )
    return conversation([turn], rng)


def general(rng: random.Random) -> Document:
    """A short passage of general sentences."""
    return [(" ".join(draw_general(rng, reserved=False) for _ in range(rng.randint(1, 4))), True)]


def snippet(rng: random.Random) -> Document:
    """A JSON object with unrelated keys and values."""
    return [(json.dumps({key: json_value(rng) for key in rng.sample(KEYS[:-4], rng.randint(1, 5))}), True)]


def json_value(rng: random.Random) -> Any:
    """A random JSON value."""
    choices = (
        rng.choice(WORDS),
        rng.choice(WORDS),
        rng.randint(0, 999),
        rng.random() < 0.5,
        rng.sample(WORDS, 2),
    )
    return rng.choice(choices)


def trip(rng: random.Random) -> Document:
    """A sentence about a journey turned into JSON: practice for family two that shares none of its keys."""
    person, town, travel = rng.choice(NAMES), rng.choice(TOWNS), rng.choice(TRAVEL)
    days, food = rng.choice(list(COUNTS)), rng.choice(FOODS)
    sentence, facts = rng.choice(
        [
            (f"{person} goes to {town} by {travel}.", {"who": person, "place": town, "by": travel}),
            (
                f"{person} stays in {town} for {days} days.",
                {"days": COUNTS[days], "place": town, "who": person},
            ),
            (f"{person} ate {food} in {town}.", {"food": food, "who": person, "city": town}),
            (f"By {travel} to {town} in {days} days.", {"by": travel, "place": town, "days": COUNTS[days]}),
        ]
    )
    return conversation([(f"Trip: {sentence} In braces.", json.dumps(facts))], rng)


def tool_use(rng: random.Random) -> Document:
    """A conversation in which the assistant calls a tool and reports what it returned."""
    town, weather, degrees = rng.choice(TOWNS), rng.choice(WEATHER), str(rng.randint(0, 40))
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    call = {"function": {"name": "get_weather", "arguments": {"city": town}}}
    return chat(
        [
            say("user", f"What is the weather in {town}?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            say("tool", f"{weather}, {degrees} degrees"),
            say("assistant", f"{town} has {weather} and {degrees} degrees."),
        ],
        [tool],
    )


def small_talk(rng: random.Random) -> Document:
    """Greetings and simple questions, with one or more turns."""
    person, animal, place, time = (
        rng.choice(PEOPLE),
        rng.choice(ANIMALS),
        rng.choice(PLACES),
        rng.choice(TIMES),
    )
    name, word, number = rng.choice(NAMES), rng.choice(list(COUNTS)), rng.randint(1, 998)
    turns = [
        ("Hello.", "Hello. How can I help?"),
        (f"My name is {name}.", f"Hello, {name}."),
        (f"The {person} went to the {place} {time}. Who went?", f"The {person}."),
        (f"The {person} went to the {place} {time}. When?", f"{time[0].upper()}{time[1:]}."),
        (f"The {animal} is in the {place}. Where is the {animal}?", f"In the {place}."),
        (f"Write {word} as a number.", str(COUNTS[word])),
        (f"Write {COUNTS[word]} as a word.", word),
        (f"What comes after {number}?", str(number + 1)),
        ("Tell me something.", draw_general(rng, reserved=False)),
        ("Thank you.", "You are welcome."),
    ]
    return conversation(rng.sample(turns, rng.randint(1, 4)), rng)


def document(rng: random.Random, wrong_share: float) -> Document:
    """Draw one training document."""
    makers: list[tuple[float, Callable[[random.Random], Document]]] = [
        (0.32, lambda rng: additions(rng, wrong_share)),
        (0.22, orders),
        (0.20, copying),
        (0.09, general),
        (0.03, snippet),
        (0.06, trip),
        (0.02, tool_use),
        (0.06, small_talk),
    ]
    shares, kinds = zip(*makers, strict=True)
    make: Callable[[random.Random], Document] = rng.choices(kinds, shares)[0]
    return make(rng)
