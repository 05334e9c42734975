"""The Crafter example in short: the game, its text, its rows, and the whole way from rows to a measured player."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import agents
import make_dataset
import play
import pytest
from expert import choose
from make_dataset import HELD_OUT_SEED, Options, Step
from pictures import draw_curves, draw_game
from PIL import Image
from prompts import TOOL, WORDS, Form, read_action
from scores import Comparison, Scores, compare_all, render, short_names
from world import ACHIEVEMENTS, ACTIONS, RULES, Game, Played

from luthier.data.rows import ReadOptions, RowReader
from luthier.data.tokens import ModelText
from luthier.errors import CallError
from luthier.runs.resolve import practice_folder
from luthier.spec.data import Data
from luthier.spec.load import load_spec, load_spec_text
from tests.calling import call
from tests.unit.evals.test_judge import Endpoint, chat

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "crafter"
MOST_TOKENS = 200
Captured = pytest.CaptureFixture[str]


class Watched:
    """An agent that keeps every observation it is shown."""

    def __init__(self, agent: agents.Agent) -> None:
        self.name, self._agent, self.seen = agent.name, agent, list[str]()

    def choose(self, games: Sequence[Game]) -> list[str]:
        self.seen += [game.describe() for game in games]
        return self._agent.choose(games)


# -- the game ------------------------------------------------------------------------------------------------------

_REPLAY = """
import sys; sys.path.insert(0, sys.argv[1])
from world import Game
from expert import choose
ballast = [object() for _ in range(int(sys.argv[2]))]
game = Game(11, 120)
while not game.is_over:
    print(game.describe()); game.act(choose(game))
"""


def test_a_seed_is_one_game_in_every_process() -> None:
    """Crafter alone takes creatures from sets, whose order is that of addresses in memory."""
    told = [
        subprocess.run([sys.executable, "-c", _REPLAY, EXAMPLE, size], capture_output=True, text=True, check=True)
        for size in ("0", "100000")
    ]
    assert told[0].stdout == told[1].stdout
    assert told[0].stdout.count("health") == 120
    assert Game(11).describe() != Game(12).describe()


def test_drawing_does_not_change_a_game() -> None:
    """Crafter draws the noise of its nights from the dice of the game."""
    plain, drawn = Game(3, 230), Game(3, 230)
    while not plain.is_over:
        action = choose(plain)
        if len(drawn.actions) > 200:
            assert drawn.picture().shape == (288, 288, 3)
        plain.act(action)
        drawn.act(action)
        assert plain.describe() == drawn.describe()


@pytest.fixture(scope="module")
def played() -> tuple[Watched, Scores, Watched, Scores]:
    """Six games of the expert, and the same six of the dice."""
    expert, dice = Watched(agents.Expert()), Watched(agents.Dice())
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + 6)
    return expert, play.play(expert, seeds, 200, quiet=True), dice, play.play(dice, seeds, 200, quiet=True)


def test_an_observation_is_short(played: tuple[Watched, Scores, Watched, Scores]) -> None:
    tokenizer = ModelText(practice_folder()).tokenizer
    seen = [*played[0].seen, *played[2].seen]
    assert len(seen) > 1500
    lengths = [len(each.ids) for each in tokenizer.encode_batch_fast(seen, add_special_tokens=False)]
    assert 60 < max(lengths) <= MOST_TOKENS


def test_the_expert_is_far_better_than_dice(played: tuple[Watched, Scores, Watched, Scores], tmp_path: Path) -> None:
    expert, dice = played[1], played[3]
    assert expert.mean_different.value >= 8
    assert dice.mean_different.value <= 4
    assert Comparison(expert, dice).gain.change == "better"
    assert expert.score.low > dice.score.high
    table = render([dice, expert])
    draw_curves([dice, expert], 200, tmp_path / "curves.svg")
    assert "expert" in (tmp_path / "curves.svg").read_text("utf-8")
    assert expert.curve(200)[[0, -1], 1].tolist() == [0, expert.mean_different.value]
    assert "expert against random" in table
    assert "nobody reaches: " in table


def test_scores_are_those_of_the_games() -> None:
    games = [Game(seed, 5) for seed in range(2)]
    games[0].reached[:] = ["collect_wood", "wake_up"]
    games[1].reached[:] = ["collect_wood"]
    games[0].total, games[1].total = 2.0, 0.9
    found = Scores("x", [game.played() for game in games])
    assert found.mean_different.value == 1.5
    assert (found.mean_different.low, found.mean_different.high) == (1.0, 2.0)
    assert found.mean_return.value == pytest.approx(1.45)
    assert [rate.value for rate in found.rates.values() if rate.value] == [1.0, 0.5]
    assert found.score.value == pytest.approx((101 * 51) ** (1 / len(ACHIEVEMENTS)) - 1)
    assert len(found.as_dict()["achievements"]) == 22


def _scored(name: str, counts: Sequence[int]) -> Scores:
    """Games that reached so many achievements each."""
    games = [Played(seed, 5, (), ACHIEVEMENTS[:count], (), 0.0, 0) for seed, count in enumerate(counts)]
    return Scores(name, games)


@pytest.mark.parametrize(
    ("last", "change", "where"),
    [
        ([8, 6, 9, 7, 7, 8, 6, 9], "no detectable difference", "y lies with 7.50 within the interval of x"),
        ([4, 3, 5, 4, 3, 4, 3, 4], "worse", "y lies with 3.75 outside of the interval of x"),
    ],
)
def test_the_last_agent_is_put_beside_the_one_before_it(last: list[int], change: str, where: str) -> None:
    found = [_scored("base", [0] * 8), _scored("x", [7, 8, 6, 9, 8, 7, 9, 6]), _scored("y", last)]
    made = compare_all(found)
    assert [(each.agent.name, each.against.name) for each in made] == [("x", "base"), ("y", "base"), ("y", "x")]
    assert [each.gain.change for each in made] == ["better", "better", change]
    assert made[2].as_dict()["is_within_interval"] == ("within" in where)
    lines = render(found).splitlines()
    assert lines[-2].startswith("  y against x: ")
    assert lines[-2].endswith(change)
    assert where in lines[-1]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["practice", "ft:practice:full_x_1", "ft:practice:qlora_x_2"], ["practice", "full", "qlora"]),
        (["runs/lora_x_1", "runs/lora_x_2/"], ["lora_x_1", "lora_x_2"]),
        (["a/model", "b/model"], ["a/model", "b/model"]),
        (["x", "x"], ["x", "x"]),
    ],
)
def test_names_are_short_as_long_as_they_differ(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_how_many_agents_play_at_once_changes_nothing(capsys: Captured) -> None:
    def played(*more: str) -> Any:
        assert play.run(["random", "expert", "--games", "2", "--length", "12", "--json", *more]) == 0
        told = json.loads(capsys.readouterr().out)
        return told["comparisons"], [{**each, "seconds": 0} for each in told["agents"]]

    assert played() == played("--processes", "2")


def test_a_game_is_drawn_as_it_was_played(tmp_path: Path) -> None:
    game = Game(HELD_OUT_SEED, 60)
    while not game.is_over:
        game.act(choose(game))
    strip, animation = draw_game(game.played(), tmp_path, "one")
    with Image.open(strip) as picture, Image.open(animation) as pictures:
        assert picture.size[0] >= 480
        assert getattr(pictures, "n_frames", 0) > 10


# -- what is asked, and what is answered ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        ("move_left", "move_left"),
        (" Move left.\n", "move_left"),
        ("`do`", "do"),
        ("below", "move_down"),
        ("place seed", "place_plant"),
        ("I would make_stone_pickaxe now", "make_stone_pickaxe"),
        ("<think>move_up?</think>sleep", "sleep"),
        ('<tool_call>\n{"name": "act", "arguments": {"action": "do"}}\n</tool_call>', "do"),
        ('{"action": "place_table"}', "place_table"),
    ],
)
def test_an_action_is_read(answer: str, action: str) -> None:
    assert read_action(answer) == action


@pytest.mark.parametrize(
    "answer", ["", "do you sleep?", "{}", '{"action": 3}', "[1]", "{broken", "Answer with one action"]
)
def test_what_names_no_action_is_a_step_of_nothing(answer: str) -> None:
    assert read_action(answer) not in ACTIONS
    game = Game(0, 3)
    game.act(read_action(answer))
    assert (game.actions, game.unknown) == (["noop"], 1)
    assert "did nothing" in game.describe()


@pytest.mark.parametrize("form", [Form(), Form(rules=True), Form(tools=True)])
def test_a_model_is_asked_as_the_rows_teach(form: Form) -> None:
    reader = RowReader(ReadOptions(Data(), None, practice_folder()), ("rows",))
    seen, action = Game(0).describe(), "move_left"
    row = form.row(seen, action)
    question = reader.question(row)
    assert reader.prompt(form.messages(seen), form.tool_list) == question.prompt
    assert read_action(question.answer) == action
    assert (RULES in question.prompt) == form.rules
    assert (row.get("tools") == [TOOL]) == form.tools


def test_brief_answers_can_be_said_by_a_model_whose_vocabulary_is_frozen() -> None:
    """Tokens that the practice model's training never met were pushed far out, all in one direction."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    weights = load_file(practice_folder() / "model.safetensors")["model.embed_tokens.weight"].float()
    tokenizer = ModelText(practice_folder()).tokenizer

    def farthest(text: str) -> float:
        return float(torch.linalg.norm(weights[tokenizer.encode(text, add_special_tokens=False).ids], dim=1).max())

    assert sorted(WORDS) == sorted(ACTIONS)
    assert max(farthest(words) for words in WORDS.values()) < 2.5 < farthest("move_down")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(lambda body: chat("sleep"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_plays(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv(agents.KEY, "abc")
    endpoint.failing = [503]
    monkeypatch.setattr("luthier.evals.endpoint._FIRST_WAIT_SECONDS", 0.0)
    asked = ["--endpoint", endpoint.url, "--model", "ft:x:y", "--games", "2", "--length", "3", "--json"]
    assert play.run(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["agents"][0]["name"], told["agents"][0]["unknown_share"]) == ("ft:x:y", 0)
    path, key, body = endpoint.seen[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer abc", "ft:x:y")
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert len(endpoint.seen) == 7


def test_an_endpoint_may_call_the_tool(endpoint: Endpoint) -> None:
    call = {"type": "function", "function": {"name": "act", "arguments": '{"action": "do"}'}}
    endpoint.reply = lambda body: {"choices": [{"message": {"content": None, "tool_calls": [call]}}]}
    agent = agents.Endpoint(endpoint.url, "m", Form(tools=True))
    assert agent.choose([Game(0)]) == ["do"]
    assert endpoint.seen[0][2]["tools"] == [TOOL]


def test_an_endpoint_that_refuses_says_so_without_the_key(endpoint: Endpoint) -> None:
    endpoint.failing = [401]
    with pytest.raises(CallError, match="it answered 401") as caught:
        agents.Endpoint(endpoint.url, "m", Form(), key="busy").ask("x")
    assert "busy" not in str(caught.value)
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize("url", ["localhost:1", "ftp://x/v1", "http://localhost/v1?key=x"])
def test_an_address_must_be_one(url: str) -> None:
    with pytest.raises(CallError, match="is no address"):
        agents.build_endpoint(url, "m", Form(), 0.0)


# -- rows ----------------------------------------------------------------------------------------------------------


def _steps(**counts: int) -> list[Step]:
    names = [name for name, count in counts.items() for _ in range(count)]
    return [Step(number % 7, number, f"seen {number}", name) for number, name in enumerate(names)]


def test_rare_actions_are_kept_whole() -> None:
    kept = make_dataset.thin_out(_steps(do=50, move_up=30, place_table=3), 23)
    assert {name: sum(step.action == name for step in kept) for name in ("do", "move_up", "place_table")} == {
        "do": 10,
        "move_up": 10,
        "place_table": 3,
    }
    assert make_dataset.thin_out(_steps(do=5), 5) == _steps(do=5)


def test_a_held_out_game_stays_held_out_when_games_are_added() -> None:
    few, many = (make_dataset.part_games(range(count), 0.05) for count in (100, 400))
    assert len(few) == 5
    assert few == {seed for seed in many if seed < 100}
    assert make_dataset.part_games(range(100), 0) == set()


def test_every_step_is_in_one_place_and_no_game_on_both_sides() -> None:
    traces = make_dataset.play_games(range(8), 60, 0.1, processes=1)
    sides, account = make_dataset.make_rows(traces, Options(8, 60, 5, 200, 0.25, Form()))
    seeds = {name: {step.seed for step in steps} for name, steps in sides.items()}
    assert seeds["train"]
    assert seeds["valid"] <= {3, 7}
    assert not seeds["train"] & seeds["valid"]
    assert account["train"] + account["valid"] <= 200
    assert sum(account["actions"].values()) == account["train"] + account["valid"]
    kept = {trace.seed for trace in traces if len(trace.reached) >= 5}
    assert seeds["train"] | seeds["valid"] <= kept


# -- the whole way -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of four games, made as a person makes them."""
    folder = tmp_path_factory.mktemp("rows")
    script = [sys.executable, str(EXAMPLE / "make_dataset.py"), "--out", str(folder)]
    sizes = ["--games", "4", "--length", "80", "--valid", "0.25", "--min-achievements", "0"]
    done = subprocess.run([*script, *sizes], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "every step is in one place" in done.stdout
    return folder


def _train(capsys: Captured, spec: Path, rows: Path, out: Path, *more: str) -> Any:
    data = ["--data", str(rows / "train.jsonl"), "--set", f'data.valid="{rows / "valid.jsonl"}"']
    steps = ["--set", "optim.batch=8", "--set", "evaluate.every_steps=2", "--steps", "2"]
    return call(capsys, "train", str(spec), *data, *steps, "--output-dir", str(out), *more)


def test_rows_have_no_bad_one_among_them(rows: Path, capsys: Captured) -> None:
    found = call(capsys, "data", "check", str(rows / "train.jsonl"), "--model", "practice")
    assert found["dropped"] == 0
    written = sum(len((rows / f"{side}.jsonl").read_text("utf-8").splitlines()) for side in ("train", "valid"))
    account = json.loads((rows / "dataset.json").read_text("utf-8"))
    assert written == account["train"] + account["valid"] == sum(account["actions"].values())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_from_rows_to_a_player_and_on_from_there(rows: Path, tmp_path: Path, capsys: Captured) -> None:
    full = _train(capsys, EXAMPLE / "crafter_fft.toml", rows, tmp_path / "runs")
    assert (full["state"], full["step"]) == ("finished", 2)

    evaluation = tmp_path / "evaluation.toml"
    evaluation.write_text(f'model = "{full["model"]}"\nagainst = ["random"]\ngames = 2\nlength = 6\n', "utf-8")
    out = tmp_path / "played.json"
    assert play.run(["--config", str(evaluation), "--json", "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text("utf-8"))
    assert [each["name"] for each in told["agents"]] == ["random", full["model"]]
    assert [each["games"] for each in told["agents"]] == [2, 2]
    assert (told["length"], told["first_seed"]) == (6, HELD_OUT_SEED)
    assert play.run(["random", "--games", "1", "--length", "2", "--at-least", "9", "--json"]) == 1

    # A Synth job that starts from the result, as `[model].source`.
    text = (EXAMPLE / "crafter_qlora_synth.toml").read_text("utf-8")
    follow = tmp_path / "follow.toml"
    follow.write_text(text.replace('[job]\nmodel = "Qwen/Qwen3-4B"', f'[model]\nsource = "{full["model"]}"\n\n[job]'))
    after = _train(capsys, follow, rows, tmp_path / "runs")
    assert after["state"] == "finished"
    lineage = json.loads((Path(after["folder"]) / "lineage.json").read_text("utf-8"))
    assert full["model"].endswith(lineage["parent"])


# -- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fft", "qlora"])
def test_a_recipe_promises_and_its_synth_form_says_the_same(kind: str) -> None:
    ours = load_spec(EXAMPLE / f"crafter_{kind}.toml").spec
    theirs = load_spec(EXAMPLE / f"crafter_{kind}_synth.toml").spec
    assert ours.about.command.endswith(f"crafter_{kind}.toml")
    for part in (ours.about.title, ours.about.hardware, ours.about.promise, ours.about.evidence):
        assert part
        assert len(part) < 160
    assert "different achievements" in ours.about.promise
    assert (ours.model.base, theirs.model.base) == ("practice", "Qwen/Qwen3-4B")
    assert (theirs.compute.gpu_type, theirs.compute.gpu_count) == ("H100", 1)
    assert ours.method.kind == theirs.method.kind == {"fft": "full", "qlora": "qlora"}[kind]
    assert getattr(ours.method, "rank", None) == getattr(theirs.method, "rank", None)
    for spec in (ours, theirs):
        names = [Path(str(part)).name for part in (spec.data.train, spec.data.valid)]
        assert names == ["train.jsonl", "valid.jsonl"]
    # Ours are relative to the file, theirs to the working directory: from the checkout it is one folder.
    assert (ROOT / str(theirs.data.train)).resolve() == (EXAMPLE / str(ours.data.train)).resolve()


@pytest.mark.parametrize("kind", ["fft", "qlora"])
def test_the_synth_form_for_the_practice_model_trains_the_same(kind: str) -> None:
    ours = load_spec(EXAMPLE / f"crafter_{kind}.toml").spec
    theirs = load_spec(EXAMPLE / f"crafter_{kind}_synth_practice.toml").spec
    for part in ("model", "method", "optim", "objective", "compute", "engine", "evaluate", "seed"):
        assert getattr(ours, part) == getattr(theirs, part), part
    paths = {"train": Path("x"), "valid": "y"}
    assert ours.data.model_copy(update=paths) == theirs.data.model_copy(update=paths)


def test_the_source_of_a_synth_job_may_be_a_result() -> None:
    text = '[model]\nsource = "ft:practice:full_x"\n[hyperparameters]\nn_epochs = 1'
    assert load_spec_text(text, "toml", name="job.toml", base_dir=ROOT).spec.model.base == "ft:practice:full_x"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modle = 1", "unknown key `modle`"),
        ("model = [", "is no TOML"),
        ("games = 2", "nobody plays"),
        ("games = true", "`games` is True"),
    ],
)
def test_an_evaluation_with_a_slip_says_so(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(CallError, match=says):
        play.run(["--config", str(path)])


def test_the_evaluation_that_is_shipped_is_understood() -> None:
    given = play.read_call(["--config", str(EXAMPLE / "evaluation.toml"), "--games", "3"])
    assert (given.agents, given.games, given.length) == (["random", "practice"], 3, 200)
