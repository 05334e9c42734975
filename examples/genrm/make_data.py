"""Make raw rows for a judge, always the same: answers to orders with controlled mistakes, and scores that follow.

`scored.jsonl` holds two answers to each prompt with a critique and a score, and a few faulty rows. `pairs.jsonl` holds
other prompts with a better and a worse answer, unscored. `judgements.jsonl` holds a right and a wrong judgement of
answers to further prompts. An answer loses one of five points for each field that is wrong or left out.
"""

import argparse
import json
import random
import sys
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from practice_text import COLOURS, COUNTS, ITEMS, JSON_REQUESTS, NAMES, Order, draw_order

SEED = 11
PROMPTS, PAIRS, JUDGEMENTS = 1050, 150, 120
TEMPLATE = Path(__file__).with_name("template.txt")
BEST = 5
# How often an answer has no mistake, one, two, three or four.
MISTAKE_SHARES = (30, 25, 20, 15, 10)
LEFT_OUT_SHARE = 0.15
VALUES: dict[str, list[Any]] = {"item": ITEMS, "colour": COLOURS, "count": list(COUNTS.values()), "name": NAMES}

Row = dict[str, Any]


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/raw"), help="folder that receives the files")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts of scored.jsonl, with two answers each")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of pairs.jsonl")
    parser.add_argument("--judgements", type=int, default=JUDGEMENTS, help="rows of judgements.jsonl")
    options = parser.parse_args()
    rng = random.Random(SEED)
    orders = iter(distinct_orders(rng, options.prompts + options.pairs + options.judgements))
    scored = [row for order in islice(orders, options.prompts) for row in scored_rows(rng, order)]
    files = {
        "scored.jsonl": with_faults(rng, [json.dumps(row) for row in scored]),
        "pairs.jsonl": [json.dumps(pair_row(rng, order)) for order in islice(orders, options.pairs)],
        "judgements.jsonl": [json.dumps(judgement_row(rng, order)) for order in islice(orders, options.judgements)],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (options.out / name).write_text("".join(f"{line}\n" for line in lines))
        print(f"{options.out / name}: {len(lines)} rows")


def distinct_orders(rng: random.Random, size: int) -> list[Order]:
    """Orders that the practice model never saw, no two with the same content."""
    found: dict[str, Order] = {}
    while len(found) < size:
        order = draw_order(rng, reserved=True)
        found.setdefault(order.json, order)
    return list(found.values())


def answer(rng: random.Random, order: Order, mistakes: int) -> tuple[str, str]:
    """An answer with so many mistakes, and the critique that walks through its fields."""
    right = json.loads(order.json)
    wrong = rng.sample(list(right), mistakes)
    said: Row = {}
    remarks = []
    for key, value in right.items():
        remark = f"{key} {value}"
        if key not in wrong:
            said[key] = value
        elif rng.random() < LEFT_OUT_SHARE:
            remark += " not there"
        else:
            said[key] = rng.choice([other for other in VALUES[key] if other != value])
            remark += f" not {said[key]}"
        remarks.append(remark)
    return json.dumps(said), ", ".join(remarks)


def question(rng: random.Random, order: Order) -> str:
    """What the answers answer."""
    return f"{order.sentence} {rng.choice(JSON_REQUESTS)}"


def scored_rows(rng: random.Random, order: Order) -> list[Row]:
    """Two different answers to one prompt, each with its critique and its score."""
    asked = question(rng, order)
    rows: dict[str, Row] = {}
    while len(rows) < 2:
        mistakes = rng.choices(range(len(MISTAKE_SHARES)), MISTAKE_SHARES)[0]
        response, critique = answer(rng, order, mistakes)
        rows[response] = {"prompt": asked, "response": response, "score": BEST - mistakes, "critique": critique}
    return list(rows.values())


def pair_row(rng: random.Random, order: Order) -> Row:
    """A better answer and a worse one; nobody says by how much."""
    fewer, more = sorted(rng.sample(range(len(MISTAKE_SHARES)), 2))
    chosen, rejected = (answer(rng, order, mistakes)[0] for mistakes in (fewer, more))
    return {"prompt": question(rng, order), "chosen": chosen, "rejected": rejected}


def judgement_row(rng: random.Random, order: Order) -> Row:
    """One answer, judged rightly and wrongly: the wrong judgement is that of another answer to the same prompt."""
    fewer, more = sorted(rng.sample(range(len(MISTAKE_SHARES)), 2))
    (response, critique), (_, other) = answer(rng, order, fewer), answer(rng, order, more)
    asked = TEMPLATE.read_text().removesuffix("\n").replace("{prompt}", question(rng, order))
    return {
        "prompt": asked.replace("{response}", response),
        "chosen": f"{critique}\ngrade: {BEST - fewer}",
        "rejected": f"{other}\ngrade: {BEST - more}",
    }


def with_faults(rng: random.Random, lines: list[str]) -> list[str]:
    """Scatter what real files hold: no score, one off the scale, an empty answer, half a line, two endless answers."""
    first = json.loads(lines[0])
    endless = " ".join([first["response"]] * 120)
    faults = [
        json.dumps({**first, "score": None}),
        json.dumps({**first, "score": 11}),
        json.dumps({**first, "response": ""}),
        lines[0][:-9],
        json.dumps({**first, "response": endless, "score": 2}),
        json.dumps({**first, "response": f"{endless} {endless}", "score": 1}),
        lines[3],
    ]
    for fault in faults:
        lines.insert(rng.randrange(len(lines) // 2, len(lines)), fault)
    return lines


if __name__ == "__main__":
    main()
