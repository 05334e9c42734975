"""What a run came to, for people: one model of the facts, and pages, figures and advice made from it."""
