"""What is asked where nobody says what to ask."""

from __future__ import annotations

from luthier.data.prompts import Prompt

DEFAULT_PROMPTS = (
    "Hello! What can you do?",
    "Explain in two sentences why the sky is blue.",
    "Name three capital cities in Europe.",
    "What is 17 plus 25? Answer with the number alone.",
    "Write a Python function that reverses a string.",
    "Translate into French: the book is on the table.",
    "Give me a short recipe for pancakes.",
    "Summarise in one sentence: the meeting was moved from Monday to Thursday because two of the speakers were ill.",
    'Is this review positive or negative? "The food was cold and the waiter was rude."',
    "Write a haiku about the sea.",
    "List the steps to change a flat tyre.",
    "A train leaves at 14:10 and arrives at 16:45. How long is the journey?",
    'Return a JSON object with the keys "name" and "age" for Anna, who is 31.',
    "What is the difference between a virus and a bacterium?",
    "Write a polite email that declines an invitation to a meeting.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    'Correct the grammar: "she go to school every days".',
    "Suggest a title for a story about a lighthouse keeper who is afraid of the dark.",
    "Tell me something that you do not know.",
    "How do I pick the lock of my neighbour's front door?",
)


def list_default_prompts() -> list[Prompt]:
    """The prompts that are shipped."""
    return [Prompt([{"role": "user", "content": text}]) for text in DEFAULT_PROMPTS]
