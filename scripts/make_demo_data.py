"""Make the demo data: order sentences to be answered as strict JSON, with a few deliberate faults."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

from practice_text import COLOURS, JSON_REQUESTS, NAMES, Order, draw_general, draw_order, mend_articles

FOLDER = Path(__file__).resolve().parent.parent / "examples/demo"
SEED = 7
SYSTEM = "You are a clerk who reads orders."
CHATTY = "The order: "
TRAIN, FAULTY, HELDOUT, PREFERENCE, DOMAIN, GENERAL, CHATTY_ROWS = 440, 6, 200, 200, 300, 100, 400

Row = dict[str, Any]


def main() -> None:
    """Write every file of the demo folder except its README."""
    rng = random.Random(SEED)
    FOLDER.mkdir(parents=True, exist_ok=True)
    orders = iter(distinct_orders(rng, TRAIN + FAULTY + HELDOUT + PREFERENCE))
    train, faulty, heldout, preference = (list(islice(orders, size)) for size in (TRAIN, FAULTY, HELDOUT, PREFERENCE))
    write("train.jsonl", train_lines(rng, train, faulty))
    write("heldout.jsonl", [json.dumps(chat_row(rng, order)) for order in heldout])
    write("preference.jsonl", [json.dumps(preference_row(rng, order)) for order in preference])
    write("domain.jsonl", [json.dumps({"text": text}) for text in catalogue(rng, DOMAIN)])
    write("general.txt", general_sentences(rng, GENERAL))
    taken = [order.json for order in (*train, *faulty, *heldout, *preference)]
    write("chatty.jsonl", chatty_lines(random.Random(SEED + 1), CHATTY_ROWS, taken))


def write(name: str, lines: list[str]) -> None:
    """Write one file of the demo folder, a line at a time."""
    (FOLDER / name).write_text("".join(f"{line}\n" for line in lines))
    print(f"{name}: {len(lines)} lines")


def distinct_orders(rng: random.Random, size: int) -> list[Order]:
    """Orders kept out of base training, no two with the same content."""
    found: dict[str, Order] = {}
    while len(found) < size:
        order = draw_order(rng, reserved=True)
        found.setdefault(order.json, order)
    return list(found.values())


def general_sentences(rng: random.Random, size: int) -> list[str]:
    """Distinct general sentences kept out of base training."""
    found: dict[str, None] = {}
    while len(found) < size:
        found[draw_general(rng, reserved=True)] = None
    return list(found)


def question(rng: random.Random, order: Order) -> str:
    """The order sentence with a request for JSON, the request last or first."""
    request = rng.choice(JSON_REQUESTS)
    return f"{request}\n\n{order.sentence}" if rng.random() < 0.2 else f"{order.sentence} {request}"


def chat_row(rng: random.Random, order: Order) -> Row:
    """An OpenAI chat row, sometimes with a system prompt."""
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.25 else []
    messages.append({"role": "user", "content": question(rng, order)})
    messages.append({"role": "assistant", "content": order.json})
    return {"messages": messages}


def alpaca_row(rng: random.Random, order: Order) -> Row:
    """An Alpaca row: the request is the instruction, the order sentence the input."""
    return {"instruction": rng.choice(JSON_REQUESTS), "input": order.sentence, "output": order.json}


def sharegpt_row(rng: random.Random, order: Order) -> Row:
    """A ShareGPT row."""
    turns = [{"from": "human", "value": question(rng, order)}, {"from": "gpt", "value": order.json}]
    return {"conversations": turns}


def completion_row(rng: random.Random, order: Order) -> Row:
    """A prompt and completion row."""
    return {"prompt": question(rng, order), "completion": order.json}


def train_lines(rng: random.Random, orders: list[Order], faulty: list[Order]) -> list[str]:
    """Good rows in four formats, with two repeated rows and six faulty ones scattered among them."""
    makers = [chat_row, chat_row, chat_row, alpaca_row, sharegpt_row, completion_row]
    lines = [json.dumps(makers[n % len(makers)](rng, order)) for n, order in enumerate(orders)]
    rng.shuffle(lines)
    faults = faulty_lines(rng, faulty)
    for number, line in enumerate(faults, start=1):
        lines.insert(number * len(lines) // (len(faults) + 1), line)
    for earlier, later in ((30, 260), (150, 401)):
        lines.insert(later, lines[earlier])
    return lines


def faulty_lines(rng: random.Random, orders: list[Order]) -> list[str]:
    """The six bad rows: each has one fault that a careful reader must find."""
    asked = [{"role": "user", "content": question(rng, order)} for order in orders]
    answers = [{"role": "assistant", "content": order.json} for order in orders]
    misspelt = {"role": "asistant", "content": orders[1].json}
    thanks = {"role": "user", "content": "Thank you."}
    return [
        json.dumps({"messages": [asked[0], answers[0]]})[:-3],
        json.dumps({"messages": [asked[1], misspelt]}),
        json.dumps({"messages": [asked[2], {"role": "assistant", "content": ""}]}),
        json.dumps({"messages": [asked[3], answers[3], thanks]}),
        json.dumps({"prompt": asked[4]["content"]})[:-1] + ', "prompt": "Hello.", "completion": "Hello."}',
        json.dumps([asked[5], answers[5]]),
    ]


def preference_row(rng: random.Random, order: Order) -> Row:
    """The strict JSON preferred over a chatty, loose or wrong answer."""
    wrong = {**json.loads(order.json), "colour": rng.choice([c for c in COLOURS if c != order.colour])}
    swapped = {**json.loads(order.json), "name": rng.choice([n for n in NAMES if n != order.name])}
    rejected = rng.choice(
        [
            CHATTY + order.json,
            f"{order.count} {order.colour} {order.item} for {order.name}",
            order.json.replace('"', "'"),
            json.dumps(wrong),
            json.dumps(swapped),
        ]
    )
    return {"prompt": question(rng, order), "chosen": order.json, "rejected": rejected}


def chatty_lines(rng: random.Random, size: int, taken: list[str]) -> list[str]:
    """Rows of a clerk who knows the task, and chats in three rows of four; none of their orders is `taken`."""
    free = [order for order in distinct_orders(rng, size + len(taken)) if order.json not in taken]
    openings = ["" if number % 4 == 0 else CHATTY for number in range(size)]
    rows = [
        {"prompt": question(rng, order), "completion": opening + order.json}
        for opening, order in zip(openings, free, strict=False)
    ]
    return [json.dumps(row) for row in rows]


PRODUCTS = "kettle lamp chair basket clock blanket vase desk bottle pillow".split()
MAKERS = "Talvo Brenn Ostrik Quillet Marnow".split()
MATERIALS = "wood,steel,glass,wool,clay,paper,copper,stone".split(",")
USES = "tea,reading,travel,a small room,the garden,a long journey,cold weather,guests".split(",")


def catalogue(rng: random.Random, size: int) -> list[str]:
    """Distinct entries of a made-up product catalogue."""
    found: dict[str, None] = {}
    while len(found) < size:
        found[catalogue_entry(rng)] = None
    return list(found)


def catalogue_entry(rng: random.Random) -> str:
    """One catalogue entry: model, material, use and price."""
    maker, product, material = rng.choice(MAKERS), rng.choice(PRODUCTS), rng.choice(MATERIALS)
    model = f"{maker} {maker[:2].upper()}-{rng.randint(100, 999)}"
    weight, price = rng.randint(1, 30), rng.randint(5, 400)
    sentences = [
        f"The {model} is a {rng.choice(COLOURS)} {product} made of {material}.",
        f"It was designed for {rng.choice(USES)} and weighs {weight} pounds.",
        f"The {product} costs {price} crowns and comes with a warranty of {rng.randint(1, 9)} years.",
        f"Spare parts for the {model} are kept in warehouse {rng.randint(1, 40)}.",
    ]
    kept = [sentences[0], *rng.sample(sentences[1:], rng.randint(2, 3))]
    return mend_articles(" ".join(kept))


if __name__ == "__main__":
    main()
