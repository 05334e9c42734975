"""Measures what the practice model can do: additions, order questions, JSON orders, copying, fluency."""

import math
import random
from typing import Any

import torch
from practice_corpus import addition, plain
from practice_text import JSON_REQUESTS, ORDER_QUESTIONS, draw_general, draw_order
from torch.nn.functional import cross_entropy

Question = tuple[str, str]


def examine(model: Any, tokenizer: Any, seed: int, size: int = 400) -> dict[str, float]:
    """Every measured figure: shares of right answers, and the perplexity of held-out general text."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model.eval()
    sums = [addition(rng, 0.0) for _ in range(size)]
    chat_sums = [(chat_prompt(tokenizer, question), answer) for question, answer in sums]
    plain_sums = [(plain_prompt(rng, question), f" {answer}") for question, answer in sums]
    return {
        "addition, chat, greedy": accuracy(model, tokenizer, chat_sums),
        "addition, chat, sampled": accuracy(model, tokenizer, chat_sums, sample=True),
        "addition, plain, greedy": accuracy(model, tokenizer, plain_sums, "\n\nUser:"),
        "addition, plain, sampled": accuracy(model, tokenizer, plain_sums, "\n\nUser:", sample=True),
        "family one (order questions), greedy": accuracy(model, tokenizer, family_one(tokenizer, rng, size)),
        "family two (orders as JSON), greedy": accuracy(model, tokenizer, family_two(tokenizer, rng, size // 2)),
        "copying, greedy": accuracy(model, tokenizer, copies(tokenizer, rng, size // 2)),
        "general text, perplexity per token": perplexity(model, tokenizer, rng, size // 4),
    }


def chat_prompt(tokenizer: Any, question: str) -> str:
    """A question in ChatML, ready for the assistant's answer."""
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def plain_prompt(rng: random.Random, question: str) -> str:
    """A question in the plain role form, after none to two solved ones."""
    solved = plain([addition(rng, 0.0) for _ in range(rng.randint(0, 2))])
    return "".join(text for text, _ in solved) + f" {question}\n\nAssistant:"


def family_one(tokenizer: Any, rng: random.Random, size: int) -> list[Question]:
    """Held-out orders, each with one short question."""
    questions = []
    for _ in range(size):
        order, slot = draw_order(rng, reserved=True), rng.choice(list(ORDER_QUESTIONS))
        text = f"{order.sentence} {rng.choice(ORDER_QUESTIONS[slot])}"
        questions.append((chat_prompt(tokenizer, text), order.slots[slot]))
    return questions


def family_two(tokenizer: Any, rng: random.Random, size: int) -> list[Question]:
    """Held-out orders to be written as JSON."""
    orders = [draw_order(rng, reserved=True) for _ in range(size)]
    return [(chat_prompt(tokenizer, f"{o.sentence} {rng.choice(JSON_REQUESTS)}"), o.json) for o in orders]


def copies(tokenizer: Any, rng: random.Random, size: int) -> list[Question]:
    """Held-out sentences to repeat."""
    texts = [draw_general(rng, reserved=True) for _ in range(size)]
    return [(chat_prompt(tokenizer, f"Repeat: {text}"), text) for text in texts]


def accuracy(
    model: Any, tokenizer: Any, questions: list[Question], stop: str = "<|im_end|>", sample: bool = False
) -> float:
    """The share of questions whose answer, up to the stop text, is exactly right."""
    right = 0
    for start in range(0, len(questions), 100):
        some = questions[start : start + 100]
        texts = complete(model, tokenizer, [prompt for prompt, _ in some], sample)
        right += sum(text.startswith(answer + stop) for text, (_, answer) in zip(texts, some, strict=True))
    return right / len(questions)


def complete(model: Any, tokenizer: Any, prompts: list[str], sample: bool) -> list[str]:
    """Continue each prompt, greedily or by sampling at temperature 1."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=40, do_sample=sample, **({"top_k": 0} if sample else {}))
    return [str(text) for text in tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])]


def perplexity(model: Any, tokenizer: Any, rng: random.Random, size: int) -> float:
    """The perplexity per token of held-out general sentences, each read alone."""
    total, count = 0.0, 0
    for _ in range(size):
        ids = tokenizer(draw_general(rng, reserved=True), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count)
