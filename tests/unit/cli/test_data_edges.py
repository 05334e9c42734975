"""Data commands at their edges: standard input read twice, a few examples, long rows, specs that cannot hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli.main import main
from tests.unit.cli.test_data import Captured, chat, read_json, write

LUTHIER = str(Path(sys.executable).with_name("luthier"))


def pipe(*call: str, rows: list[str]) -> subprocess.CompletedProcess[str]:
    """A call of the command line with rows at its standard input."""
    return subprocess.run([LUTHIER, *call], input="".join(f"{row}\n" for row in rows), capture_output=True, text=True)


def test_split_of_standard_input_writes_its_rows(tmp_path: Path) -> None:
    rows = [chat(f"q{n}") for n in range(20)]
    done = pipe("data", "split", "-", "--valid", "5", "-o", str(tmp_path / "out"), rows=rows)
    assert done.returncode == 0, done.stderr
    train, valid = ((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "valid"))
    assert (len(train), len(valid)) == (15, 5)
    assert sorted(train + valid) == sorted(rows)


def test_standard_input_is_not_two_files() -> None:
    done = pipe("data", "check", "-", "--valid", "-", rows=[chat("a"), chat("b")])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_split_of_some_examples_writes_those(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *(chat(f"q{n}") for n in range(30)))
    assert main(["data", "split", file, "--examples", "10", "--valid", "2", "-o", str(tmp_path / "out")]) == 0
    written = [(tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "valid")]
    assert [len(rows) for rows in written] == [8, 2]
    assert sorted(written[0] + written[1]) == sorted(chat(f"q{n}") for n in range(10))


def test_show_cuts_what_training_would_cut(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", json.dumps({"text": "one two three " * 20}))
    call = ["data", "show", file, "--model", "practice", "--max-length", "8", "--json"]
    assert main([*call, "--too-long", "truncate"]) == 0
    (row,) = read_json(capsys)["rows"]
    assert len(row["tokens"]) == len(row["trained"]) == len(row["pieces"]) == 8
    assert row["notes"] == ["truncated"]


def test_show_parts_what_training_would_part(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", json.dumps({"text": "one two three " * 20}))
    call = ["data", "show", file, "--model", "practice", "--max-length", "24", "--objective", "pretrain", "--json"]
    assert main([*call, "--too-long", "split"]) == 0
    shown = read_json(capsys)
    assert {row["line"] for row in shown["rows"]} == {1}
    assert len(shown["rows"]) > 2
    assert all(len(row["tokens"]) <= 24 and row["notes"] == ["split"] for row in shown["rows"])
    assert "".join(row["text"] for row in shown["rows"]) == "one two three " * 20 + "<|im_end|>"


def test_the_report_says_that_long_texts_can_be_split(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", json.dumps({"text": "one two three " * 20}), json.dumps({"text": "a"}))
    assert main(["data", "check", file, "--model", "practice", "--max-length", "24", "--valid", "0"]) == 0
    assert 'hint: data.too_long = "split" cuts long plain texts into pieces instead' in capsys.readouterr().out


def test_show_cuts_the_end_of_an_answer(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("a", "yes " * 60))
    call = ["data", "show", file, "--model", "practice", "--max-length", "24", "--too-long", "truncate", "--json"]
    assert main(call) == 0
    (row,) = read_json(capsys)["rows"]
    assert len(row["tokens"]) == 24
    assert row["trained_text"].startswith("yes yes")
    assert "<|im_end|>" not in row["trained_text"]


def test_show_says_which_rows_are_too_long_to_train(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("a", "yes " * 60), chat("b"))
    main(["data", "show", file, "--model", "practice", "--max-length", "24", "--too-long", "drop", "--json"])
    shown = read_json(capsys)
    assert [(entry["line"], entry["reason"]) for entry in shown["rejected"]] == [(1, "too_long")]
    assert [row["line"] for row in shown["rows"]] == [2]


def test_show_of_a_template_that_cannot_be_learnt(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", *(chat(f"magic {n}", "magic too") for n in range(3)))
    template = tmp_path / "magic.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | replace('magic', 'MAGIC') }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert main(["data", "show", file, "--model", "practice", "--chat-template", str(template), "--json"]) == 0
    assert [row["trained_text"] for row in read_json(capsys)["rows"]] == ["MAGIC too<|im_end|>"] * 3


# -- specs


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ('[objective]\nkind = "dpo"\n[data]\nunroll = true', "data.unroll"),
        ('[objective]\nkind = "dpo"\n[data]\ntrain_on = "all"', "data.train_on"),
        ('[data]\nunroll = true\ntrain_on = "all"', ""),
    ],
    ids=["pairs unrolled", "pairs whole", "turns unrolled whole"],
)
def test_settings_of_data_that_contradict_each_other_are_refused(
    tables: str, key: str, tmp_path: Path, capsys: Captured
) -> None:
    spec = tmp_path / "run.toml"
    spec.write_text(f'[model]\nbase = "practice"\n{tables}\n')
    assert main(["spec", "check", str(spec)]) == 2
    said = capsys.readouterr().err
    assert key in said
    assert "data.unroll" in said or "data.train_on" in said


@pytest.mark.parametrize("spell", ['{{"model": {}1{}}}', '{{"model": {{"base": {}1{}}}}}'], ids=["table", "value"])
def test_a_json_spec_nested_too_deeply_is_refused(spell: str, tmp_path: Path, capsys: Captured) -> None:
    spec = tmp_path / "run.json"
    spec.write_text(spell.format("[" * 900, "]" * 900))
    assert main(["spec", "check", str(spec)]) == 2
    assert "run.json" in capsys.readouterr().err


def test_an_output_is_never_the_input(tmp_path: Path, capsys: Captured) -> None:
    """A split over its own source once lost the rows that it dropped."""
    file = write(tmp_path / "rows.jsonl", *(chat(f"q{n}") for n in range(9)))
    before = Path(file).read_bytes()
    split = ["data", "split", file, "--valid", "2", "--train-out", file, "--valid-out", str(tmp_path / "v.jsonl")]
    for call in (split, ["data", "convert", file, "--to", "sharegpt", "-o", file]):
        assert main(call) == 2
        assert "is the file that the rows come from" in capsys.readouterr().err
    assert Path(file).read_bytes() == before


def test_rows_are_written_as_jsonl_only(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("a"))
    assert main(["data", "convert", file, "--to", "chat", "-o", str(tmp_path / "out.csv")]) == 2
    assert "written as JSONL" in capsys.readouterr().err


def test_nothing_left_to_train_is_no_success(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", *(chat(f"{n} " + "long " * 50) for n in range(3)))
    short = ["--model", "practice", "--max-length", "20"]
    for call in (["train", "--data", file, "--dry-run"], ["data", "split", file, "-o", str(tmp_path / "out")]):
        assert main([*call, *short]) == 1
        assert "nothing is left to train: of 3 rows 3 were dropped (3 too_long)" in capsys.readouterr().err
    assert main(["data", "check", file, *short]) == 1
    assert not (tmp_path / "out").exists()


def test_a_report_and_rows_do_not_share_standard_output(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("a"))
    assert main(["data", "prepare", file, "-o", "-", "--json"]) == 2
    assert "cannot hold both" in capsys.readouterr().out


def test_a_conversion_that_writes_nothing_fails(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", '{"text": "plain"}')
    assert (
        main(["data", "convert", file, "--to", "chat", "-o", str(tmp_path / "o.jsonl"), "--max-rejected-share", "1"])
        == 1
    )
    assert "--max-rejected-share allows 1" in capsys.readouterr().err


def test_a_share_may_start_with_its_point(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", chat("a"), "nonsense")
    assert main(["data", "check", file, "--max-rejected-share", ".5"]) == 0


def test_a_misspelt_group_names_the_nearest_key(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", '{"prompt": "a", "completion": "b", "user": 1}')
    assert main(["data", "check", file, "--group-by", "usr"]) == 1
    assert "did you mean `user`?" in capsys.readouterr().out


def test_lengths_of_unrolled_rows_are_those_of_their_examples(tmp_path: Path, capsys: Captured) -> None:
    turns = [{"role": role, "content": "one two"} for role in ("user", "assistant") * 2]
    file = write(tmp_path / "rows.jsonl", json.dumps({"messages": turns}), chat("b"))
    assert main(["data", "check", file, "--model", "practice", "--unroll", "--valid", "0", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["examples"]["train"] == 3
    assert shown["lengths"]["mean"] == pytest.approx(shown["tokens"]["train"] / 3, abs=0.05)


def test_show_of_a_spec_shows_what_its_objective_trains(tmp_path: Path, capsys: Captured) -> None:
    write(tmp_path / "rows.jsonl", chat("a"), '{"prompt": "q", "chosen": "good", "rejected": "bad"}')
    spec = tmp_path / "run.toml"
    spec.write_text('[model]\nbase = "practice"\n[data]\ntrain = "rows.jsonl"\n[objective]\nkind = "dpo"\n')
    assert main(["data", "show", str(spec), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in shown["rows"]] == ["chosen", "rejected"]
    assert [entry["reason"] for entry in shown["rejected"]] == ["wrong_kind"]
