"""Why a row is not trained: every reason has one name, used in the ledger, in reports and in the reference."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One reason; a malformed row counts against `data.max_rejected_share` and is kept in rejected.jsonl."""

    name: str
    sentence: str
    is_malformed: bool = True


_ALL = (
    Reason("not_json", "the line is not JSON"),
    Reason("not_an_object", "the row is JSON but not an object"),
    Reason("bad_utf8", "the line is not UTF-8"),
    Reason("bom", "the line starts with a byte order mark"),
    Reason("nul", "the row holds a NUL character"),
    Reason("lone_surrogate", "the row holds half of a surrogate pair"),
    Reason("non_finite_number", "the row holds NaN, Infinity or a number too large"),
    Reason("duplicate_key", "an object of the row names a key twice"),
    Reason("too_deep", "the row is nested too deeply"),
    Reason("line_too_long", "the line is longer than any row may be"),
    Reason("wrong_columns", "the line has not the columns of the header"),
    Reason("unknown_format", "the row has the keys of no known format"),
    Reason("wrong_kind", "the row is of a kind that the objective does not train"),
    Reason("missing_key", "a key that the format or `data.group_by` needs is missing"),
    Reason("wrong_type", "a value is not of the type that the format needs"),
    Reason("unknown_role", "a message has a role that does not exist"),
    Reason("misspelt_key", "a message has a key that looks like a misspelling of a known one"),
    Reason("wrong_order", "the roles do not follow each other as in a conversation"),
    Reason("empty_content", "a message says nothing"),
    Reason("no_assistant", "no assistant turn, so nothing to learn"),
    Reason("last_not_assistant", "the last turn is not the assistant's"),
    Reason("unmatched_tool_call", "a tool call without its result, or a result without its call"),
    Reason("bad_tool_call", "a tool call or tool is not of the known shape"),
    Reason("not_text", "a message holds images, audio or files; only text is trained"),
    Reason("bad_weight", "a message's weight is not 0 or 1, or stands on a turn that is never trained"),
    Reason("chosen_equals_rejected", "the preferred and the other answer are the same"),
    Reason("control_token", "the text spells one of the model's control tokens"),
    Reason("template_refused", "the model's chat template refuses the conversation"),
    Reason("duplicate", "the same row stands earlier", is_malformed=False),
    Reason("in_validation", "the same row, or another of its group, stands in the validation file", is_malformed=False),
    Reason("too_long", "longer than data.max_length", is_malformed=False),
    Reason("score_off_scale", "the score is not on the scale that scores are read by"),
    Reason("chosen_scores_lower", "the preferred answer has a lower score than the other one"),
)
REASONS = {reason.name: reason for reason in _ALL}
REASON_CODES = {reason.name: code for code, reason in enumerate(_ALL, 1)}
REASON_NAMES = {code: name for name, code in REASON_CODES.items()}


def list_counts(counts: dict[str, int]) -> str:
    """Counts as people read them: `2 too_long, 1 not_json`."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


class RowError(Exception):
    """A row cannot be used; caught where rows are read, it becomes an entry of the ledger.

    `row` is what is left of a row that could not even be split into its values.
    """

    def __init__(self, reason: str, message: str, *, row: str = "") -> None:
        super().__init__(reason, message)
        self.reason = REASONS[reason].name
        self.message = message
        self.row = row

    def __str__(self) -> str:
        return self.message
