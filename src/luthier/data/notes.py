"""Notes of the ledger: what is worth knowing of a row that is trained all the same."""

from __future__ import annotations

THINKING = "thinking_dropped"
DROPPED = "content_dropped"
EOS = "eos_added"
MARKS = "markers_differ"
TRUNCATED = "truncated"
END_CUT = "end_cut"
SPLIT = "split"
LEAK = "prompt_in_train"

NOTES = {
    THINKING: "the template drops thinking; data.unroll = true trains what it drops only of earlier turns",
    DROPPED: "the template leaves out what some message says",
    EOS: "the template ends the last turn with no token, so the end-of-sequence token was added",
    MARKS: "the template's generation markers differ from the turns as rendered",
    TRUNCATED: "the end was cut at data.max_length",
    END_CUT: "no turn keeps its end-of-turn token behind the cut",
    SPLIT: "the text is longer than data.max_length and was cut into pieces, each an example",
    LEAK: "the held-out row's prompt is trained too",
}
