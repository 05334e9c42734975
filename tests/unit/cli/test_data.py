"""The data commands: what they print, what they write, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import main

Captured = pytest.CaptureFixture[str]


def chat(user: str, answer: str = "yes") -> str:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def read_json(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


def test_check_counts_by_place_and_reason(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", *(chat(f"q{n}") for n in range(39)), chat("q0"), "nonsense")
    assert main(["data", "check", file, "--model", "practice", "--valid", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "41 rows read from rows.jsonl (40 chat)" in out
    assert "35 + 4 + 2 = 41: every row is in one place" in out
    assert "rows.jsonl:41: not JSON" in out
    assert "% of them trained" in out


def test_check_ends_with_1_beyond_the_limit_and_says_so(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("a"), chat("b"), "nonsense")
    assert main(["data", "check", file, "--json"]) == 1
    shown = read_json(capsys)
    assert shown["ok"] is False
    assert [entry["line"] for entry in shown["rejected"]] == [3]
    assert main(["data", "check", file, "--max-rejected-share", "0.5"]) == 0


def test_check_without_a_model_does_everything_but_tokens(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("a"), chat("A!", "no"), chat("b"))
    valid = write(tmp_path / "valid.jsonl", chat("a.", "held"))
    assert main(["data", "check", file, "--valid", valid, "--json"]) == 0
    shown = read_json(capsys)
    assert (shown["leakage"], shown["leaking_rows"]) == (1, ["valid.jsonl:1"])
    assert "tokens" not in shown


def test_check_takes_a_spec(tmp_path: Path, capsys: Captured) -> None:
    write(tmp_path / "rows.jsonl", chat("a"), chat("b"))
    spec = tmp_path / "run.toml"
    spec.write_text('[model]\nbase = "practice"\n[data]\ntrain = "rows.jsonl"\nvalid = 0\n')
    assert main(["data", "check", str(spec), "--json"]) == 0
    assert read_json(capsys)["trained_tokens"]["train"] > 0


def test_check_says_when_a_mask_cannot_be_trusted(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("a"), chat("b"))
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert main(["data", "check", file, "--model", "practice", "--chat-template", str(template)]) == 1
    assert "never learn to stop" in capsys.readouterr().err


def test_show_gives_tokens_and_mask(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("one"), chat("two", "caf\u00e9 \U0001f600"))
    assert main(["data", "show", file, "--model", "practice", "--json"]) == 0
    rows = read_json(capsys)["rows"]
    assert [row["line"] for row in rows] == [1, 2]
    for row, answer in zip(rows, ("yes", "caf\u00e9 \U0001f600"), strict=True):
        assert row["trained_text"] == answer + "<|im_end|>"
        assert len(row["tokens"]) == len(row["trained"]) == len(row["pieces"])
        assert "".join(row["pieces"]) == row["text"]
        assert set(row["trained"]) == {0, 1}


def test_show_one_row_by_its_line(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("one"), "", chat("two"), "nonsense")
    assert main(["data", "show", file, "--model", "practice", "--row", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("line 3: ")
    assert "\u00abyes<|im_end|>\u00bb" in out
    assert main(["data", "show", file, "--model", "practice", "--row", "4"]) == 1
    assert "not JSON" in capsys.readouterr().err
    assert main(["data", "show", file, "--model", "practice", "--row", "9"]) == 1
    assert "no row on line 9" in capsys.readouterr().err


def test_show_a_pair_shows_both_answers(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", '{"prompt": "q", "chosen": "good", "rejected": "bad"}')
    assert main(["data", "show", file, "--model", "practice", "--json"]) == 0
    assert [(row["name"], row["trained_text"]) for row in read_json(capsys)["rows"]] == [
        ("chosen", "good<|im_end|>"),
        ("rejected", "bad<|im_end|>"),
    ]


def test_show_colours_on_a_terminal_only(tmp_path: Path) -> None:
    """A real terminal gets colour, unless NO_COLOR is set; a pipe never does."""
    import os
    import pty

    file = write(tmp_path / "rows.jsonl", chat("one"))
    command = [str(Path(sys.executable).with_name("luthier")), "data", "show", file, "--model", "practice"]

    def run(**more: str) -> bytes:
        parent, child = pty.openpty()
        subprocess.run(command, stdout=child, stderr=child, check=True, env={**os.environ, **more})
        os.close(child)
        found = os.read(parent, 1 << 16)
        os.close(parent)
        return found

    assert b"\x1b[32;4" in run()
    assert b"\x1b[" not in run(NO_COLOR="1")
    assert b"\x1b[" not in subprocess.run(command, capture_output=True, check=True).stdout


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def test_show_writes_a_page_in_which_rows_are_only_text(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", chat(HOSTILE, "fine"))
    page = tmp_path / "page.html"
    assert main(["data", "show", file, "--model", "practice", "--html", str(page)]) == 0
    text = page.read_text()
    assert "<img" not in text
    assert "<script" not in text
    assert "default-src 'none'" in text


def test_prepare_writes_canonical_rows_and_keeps_the_bad_ones(tmp_path: Path, capsys: Captured) -> None:
    alpaca = json.dumps({"instruction": "Add.", "input": "1 2", "output": "3"})
    file = write(tmp_path / "rows.jsonl", alpaca, chat("a"), "nonsense")
    out = tmp_path / "out.jsonl"
    assert main(["data", "prepare", file, "-o", str(out), "--max-rejected-share", "0.5"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["Add.\n\n1 2", "a"]
    kept = json.loads((tmp_path / "out.jsonl.rejected.jsonl").read_text())
    assert (kept["line"], kept["row"]) == (3, "nonsense")
    assert main(["data", "prepare", file, "-o", str(out), "--max-examples", "1"]) == 0
    assert len(out.read_text().splitlines()) == 1


def test_convert_refuses_what_a_format_cannot_hold(tmp_path: Path, capsys: Captured) -> None:
    two = {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b")) * 2]}
    file = write(tmp_path / "rows.jsonl", chat("a"), json.dumps(two))
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", file, "--to", "completion", "-o", str(out), "--json"]) == 1
    shown = read_json(capsys)
    assert (shown["written"], shown["reasons"]) == (1, {"wrong_kind": 1})


def test_convert_there_and_back_is_the_same(tmp_path: Path) -> None:
    lines = [chat(f"q{n}", f"a{n}") for n in range(5)]
    file = write(tmp_path / "rows.jsonl", *lines)
    for name in ("sharegpt", "alpaca", "completion"):
        there, back = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-back.jsonl"
        assert main(["data", "convert", file, "--to", name, "-o", str(there)]) == 0
        assert main(["data", "convert", str(there), "--to", "chat", "-o", str(back)]) == 0
        assert [json.loads(line) for line in back.read_text().splitlines()] == [json.loads(line) for line in lines]


def test_split_gives_two_files_and_says_what_was_filtered(tmp_path: Path, capsys: Captured) -> None:
    lines = [chat(f"question {n}") for n in range(50)]
    file = write(tmp_path / "rows.jsonl", *lines, chat("long " * 200), "nonsense")
    train, valid = tmp_path / "sft" / "sft_train.jsonl", tmp_path / "sft" / "sft_valid.jsonl"
    call = ["data", "split", file, "--valid", "10", "--max-length", "64", "--model", "practice"]
    assert main([*call, "--train-out", str(train), "--valid-out", str(valid)]) == 0
    out = capsys.readouterr().out
    assert "too_long" in out
    assert "not_json" in out
    assert f"40 rows written to {train}" in out
    found = train.read_text().splitlines() + valid.read_text().splitlines()
    assert sorted(found) == sorted(lines)
    assert len(valid.read_text().splitlines()) == 10


def test_a_split_that_cannot_be_leaves_no_files(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", chat("a"), chat("b"))
    assert main(["data", "split", file, "--valid", "5", "-o", str(tmp_path / "out")]) == 1
    assert "leaves nothing to train" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_come_from_standard_input(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("luthier")), "data", "check", "-", "--json"]
    done = subprocess.run(
        command, input=(chat("a") + "\n" + chat("b") + "\n").encode(), capture_output=True, check=True
    )
    assert json.loads(done.stdout)["rows"] == 2


def test_a_dry_run_of_train_prepares_and_stops(tmp_path: Path, capsys: Captured) -> None:
    file = write(tmp_path / "rows.jsonl", *(chat(f"q{n}") for n in range(20)))
    call = ["train", "--model", "practice", "--data", file, "--method", "qlora", "--rank", "8", "--dry-run"]
    assert main([*call, "--json"]) == 0
    shown = read_json(capsys)
    assert (shown["plan"]["spec"]["method"]["kind"], shown["plan"]["spec"]["method"]["rank"]) == ("qlora", 8)
    assert shown["data"]["train"] == 19
    assert main(call) == 0
    assert "method.rank set by flag --rank" in capsys.readouterr().out


def test_flags_and_file_build_the_same_spec(tmp_path: Path, capsys: Captured) -> None:
    write(tmp_path / "rows.jsonl", chat("a"), chat("b"))
    spec = tmp_path / "run.toml"
    spec.write_text(
        '[model]\nbase = "practice"\n[data]\ntrain = "rows.jsonl"\n[method]\nkind = "lora"\nrank = 4\n'
        "[optim]\nlearning_rate = 2e-4\nepochs = 2.0\n"
    )
    main(["train", str(spec), "--dry-run", "--json"])
    from_file = read_json(capsys)["plan"]["spec"]
    flags = ["--model", "practice", "--data", str(tmp_path / "rows.jsonl"), "--method", "lora", "--rank", "4"]
    main(["train", *flags, "--learning-rate", "2e-4", "--epochs", "2.0", "--dry-run", "--json"])
    assert read_json(capsys)["plan"]["spec"] == from_file
