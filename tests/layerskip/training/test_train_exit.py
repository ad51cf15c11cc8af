"""`layerskip train-exit` on a tiny random model: input, training, output, and resuming."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from exit_training import arguments, recipe, save_model_and_texts, stopping
from safetensors.torch import load_file
from tiny import tiny_model

import layerskip
from layerskip._files import differences
from layerskip.cli import main
from layerskip.models.exit import Exit
from layerskip.training import exit_trainer, hidden_state_cache
from layerskip.training.exit_analysis import simulate_rounds
from layerskip.training.exit_run import ExitRun
from layerskip.training.exit_trainer import ExitTrainer, TrainableExit, VarlenTexts
from layerskip.training.hidden_state_cache import CachedText, GeneratedTextCache, TextCache, TopK
from layerskip.training.losses import Targets, draft_agreement
from layerskip.training.output_dir import locked

CPU = torch.device("cpu")
LENGTHS = (9, 5, 12, 7)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread would wait at every barrier: the models are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pairs_of(lengths: tuple[int, ...] = LENGTHS, prompt: int = 3, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random token ids, of which those after ``prompt`` are labelled."""
    source = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(2, 90, (length,), generator=source).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def computed(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextCache:
    monkeypatch.setattr(hidden_state_cache, "PASS_TOKENS", 15)  # two texts a pass, at most
    made = TextCache(tmp_path / "trunk", layerskip.models.adapt(model), 2, 5, pairs_of())
    made.compute()
    return made


def test_trunk_holds_what_the_model_computes(model: Any, computed: TextCache) -> None:
    for index, pair in enumerate(pairs_of()):
        with torch.no_grad():
            out = model(torch.tensor([pair["input_ids"]]), output_hidden_states=True)
        text, length = computed[index], len(pair["input_ids"])
        torch.testing.assert_close(text.states, out.hidden_states[2][0, :-1], rtol=1e-4, atol=1e-4)
        best = out.logits[0, text.first : length - 1].softmax(1).topk(5)
        assert text.first == 2  # the last prompt token's row gives the first labelled one
        assert text.top_k.ids.tolist() == best.indices.tolist()
        torch.testing.assert_close(text.top_k.probabilities.float(), best.values, rtol=1e-2, atol=1e-3)  # fp16


def test_trunk_goes_on_behind_what_is_there(
    model: Any, computed: TextCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = TextCache(tmp_path / "again", layerskip.models.adapt(model), 2, 5, pairs_of())
    done: list[int] = []

    def stop(texts: int) -> None:
        done.append(texts)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again.compute(stop)
    with (tmp_path / "again" / "states-2.bin").open("ab") as file:
        file.write(b"half a text")
    ran: list[int] = []
    monkeypatch.setattr(
        TextCache, "_compute", lambda self, indices, run=TextCache._compute: ran.extend(indices) or run(self, indices)
    )
    again.compute()
    assert len(ran) == len(LENGTHS) - sum(done)
    for index in range(len(again)):
        assert torch.equal(again[index].states, computed[index].states)
        assert torch.equal(again[index].top_k.ids, computed[index].top_k.ids)
        assert torch.equal(again[index].top_k.probabilities, computed[index].top_k.probabilities)


def test_trunk_serves_another_layer(
    model: Any, computed: TextCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same labels; only the layers before it run, also after a stop among them."""
    adapted, folder = layerskip.models.adapt(model), tmp_path / "shared"
    shutil.copytree(computed.folder, folder)
    monkeypatch.setattr(TextCache, "_compute", broken_at(0, TextCache._compute))
    done: list[int] = []

    def stop(texts: int) -> None:
        done.append(texts)
        if sum(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TextCache(folder, adapted, 1, 5, pairs_of()).compute(stop)
    other = TextCache(folder, adapted, 1, 5, pairs_of())
    other.compute(done.append)
    assert done == [0, 1, 1, 2, 1, 1], "two are there after the stop, two follow"
    for index, pair in enumerate(pairs_of()):
        with torch.no_grad():
            expected = model(torch.tensor([pair["input_ids"]]), output_hidden_states=True).hidden_states[1][0, :-1]
        torch.testing.assert_close(other[index].states, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(other[index].top_k.ids, computed[index].top_k.ids)
    assert (folder / "states-2.bin").read_bytes() == (computed.folder / "states-2.bin").read_bytes()


def test_trunk_refuses_what_is_of_other_texts(model: Any, computed: TextCache) -> None:
    other = TextCache(computed.folder, layerskip.models.adapt(model), 2, 5, pairs_of(seed=1))
    with pytest.raises(ValueError, match="digest of the texts was"):
        other.compute()


def test_trunk_refuses_what_is_of_another_model(computed: TextCache) -> None:
    other = TextCache(computed.folder, layerskip.models.adapt(tiny_model(seed=1)), 2, 5, pairs_of())
    with pytest.raises(ValueError, match="digest of the model was"):
        other.compute()


def test_trunk_refuses_a_model_with_one_other_value(model: Any, computed: TextCache) -> None:
    """The last of the largest weight, far behind the values that older versions compared."""
    changed = helpers.tiny_model("llama2", vocab_size=300)
    before = TextCache(computed.folder, layerskip.models.adapt(changed), 2, 5, pairs_of())._work
    assert changed.get_input_embeddings().weight.numel() > hidden_state_cache.DIGESTED
    with torch.no_grad():
        changed.get_input_embeddings().weight[-1, -1] += 1
    after = TextCache(computed.folder, layerskip.models.adapt(changed), 2, 5, pairs_of())._work
    assert differences(before, after).startswith("digest of the weights was")
    assert before["digest of the model"] == after["digest of the model"]


def test_trunk_of_an_older_version_is_read(model: Any, computed: TextCache) -> None:
    """It has no digest of all weights."""
    path = computed.folder / "texts.jsonl"
    header, rest = path.read_text().split("\n", 1)
    work = json.loads(header)
    del work["digest of the weights"]
    path.write_text(json.dumps(work) + "\n" + rest)
    again = TextCache(computed.folder, layerskip.models.adapt(model), 2, 5, pairs_of())
    with pytest.warns(UserWarning, match="an older version did not record the digest of the weights"):
        again.compute()
    assert torch.equal(again[3].states, computed[3].states)


def test_trunk_refuses_a_journal_with_a_line_that_is_cut_off(model: Any, computed: TextCache) -> None:
    """The places of later texts in the files would be wrong."""
    path = computed.folder / "texts.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:5], *lines[3:]]))
    again = TextCache(computed.folder, layerskip.models.adapt(model), 2, 5, pairs_of())
    with (
        pytest.warns(UserWarning, match="skipped line 3"),
        pytest.raises(ValueError, match=r"texts\.jsonl has lines that cannot be read; remove .*trunk"),
    ):
        again.compute()


def test_trunk_refuses_files_that_lack_bytes(model: Any, computed: TextCache) -> None:
    (computed.folder / "label_ids.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"label_ids\.bin is shorter than the \d+ bytes"):
        computed.compute()


def test_trunk_names_a_text_without_labels(model: Any, tmp_path: Path) -> None:
    pairs = [*pairs_of(), {"input_ids": [5, 6], "labels": [-100, -100]}]
    with pytest.raises(ValueError, match="text 4 has no labelled token"):
        TextCache(tmp_path, layerskip.models.adapt(model), 2, 5, pairs)


@pytest.mark.parametrize("architecture", ["llama2", "llama3", "qwen2", "qwen3", "smollm2"])
@pytest.mark.parametrize("num_draft_layers", [0, 1, 2])
def test_draft_layers_compute_what_the_models_layers_do(architecture: str, num_draft_layers: int) -> None:
    """Draft layers that are copies of layer 3, after layer 1, give what layers 0, 3, 3 and the head give."""
    adapted = layerskip.models.adapt(tiny_model(architecture))
    module = TrainableExit(adapted, 1, num_draft_layers, 3)
    texts, expected = [], []
    for seed, length in enumerate((6, 9)):
        ids = torch.randint(90, (1, length), generator=torch.Generator().manual_seed(seed))
        cache = adapted.decoder.new_cache(1, length)
        states = adapted.decoder(adapted.embed(ids), cache, 0, 1)
        hidden = states
        for _ in range(num_draft_layers):
            hidden = adapted.decoder(hidden, adapted.decoder.new_cache(1, length), 3, 4)
        none = torch.empty(0, 1)
        texts.append(CachedText(states[0], 2, TopK(none.int(), none.half())))
        expected.append(adapted.head(hidden[0, 2:]).token)
    hidden = module(VarlenTexts.of(texts, CPU))
    tokens = torch.cat(expected)
    targets = Targets.of(tokens[:, None], torch.ones(len(tokens), 1), None)
    assert draft_agreement(hidden, module.head_rows, targets).agrees.all()


def test_exit_of_a_module_has_its_parameters(tmp_path: Path) -> None:
    adapted = layerskip.models.adapt(tiny_model("qwen3"))
    ids = torch.tensor([1, 4, 9, 50])
    module = TrainableExit(adapted, 2, 1, 3, ids, head_rank=2)
    torch.nn.init.normal_(module.head_up)
    path = module.exit(torch.float32).save(tmp_path)
    read = Exit.load(path)
    assert (read.exit_layer, read.num_draft_layers, read.token_ids.tolist()) == (2, 1, ids.tolist())
    for name, weight in read.draft_layers[0]._asdict().items():
        assert weight is None or torch.equal(weight, getattr(module.draft_layers[0], name))
    assert torch.equal(read.head_up[ids], module.head_up)
    assert read.head_up.count_nonzero() == module.head_up.count_nonzero()


def test_rounds_by_hand() -> None:
    """Rounds of up to 2 draft tokens over the flags 11010111."""
    # round 1: rows 0, 1 agree, verification gives row 2; round 2: row 3 agrees, 4 not; round 3: 5, 6 agree, 7 is given
    found = simulate_rounds([[bool(int(flag)) for flag in "11010111"]], 2)
    assert found == ((3 / 3, 2 / 3), 8 / 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_and_texts(tmp_path_factory.mktemp("saved"))


def test_an_exit_learns_and_the_model_stays(saved: Path, tmp_path: Path) -> None:
    run = ExitRun(recipe(saved, tmp_path, steps=150, eval_every=50, learning_rate=5e-3, whole=True), CPU)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    trainer = run.trainer()
    first = trainer.agreement(trainer.texts).all
    exits: list[Exit] = []
    trainer.train(lambda state, loss: None, lambda best: exits.append(trainer.module.exit()) if best else None)
    assert trainer.agreement(trainer.texts).all > first + 0.3
    assert exits
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


def test_the_total_variation_makes_sampled_drafts_better(saved: Path, tmp_path: Path) -> None:
    """Than they were, and than the cross-entropy of the arg-max makes them."""
    sampled = {}
    for weight in (0.0, 1.0):
        run = ExitRun(
            recipe(
                saved,
                tmp_path / str(weight),
                steps=60,
                learning_rate=5e-3,
                soft=0.0,
                total_variation=weight,
                whole=True,
            ),
            CPU,
        )
        trainer = run.trainer()
        before = trainer.agreement(trainer.texts).sampled
        trainer.train(lambda state, loss: None, lambda best: None)
        sampled[weight] = trainer.agreement(trainer.texts).sampled
    assert sampled[1.0] > before + 0.1
    assert sampled[1.0] > sampled[0.0]


def test_a_run_writes_its_own_texts_and_goes_on_from_an_exit(saved: Path, tmp_path: Path, capsys: Any) -> None:
    """Whose first step is the step after the exit's last, so its loss is lower than that of a fresh run."""
    texts = {"texts": [], "prompts": [str(saved / "texts.jsonl")], "written": 9, "new_tokens": 12}
    path = tmp_path / "recipe.yaml"
    losses = []
    for name, more in (("first", {}), ("second", {"init_exit": str(tmp_path / "first")})):
        made = recipe(saved, tmp_path / name, steps=60, eval_every=20, learning_rate=5e-3, **texts, **more)
        path.write_text(json.dumps(vars(made)))
        assert main(["train-exit", str(path), "--device", "cpu"]) == 0
        losses.append(float(capsys.readouterr().out.split("step 20  loss ")[1].split()[0]))
    assert losses[1] < losses[0] - 0.3
    path.write_text(json.dumps({**vars(made), "written": 8}))
    assert main(["train-exit", str(path), "--device", "cpu", "--resume"]) == 2
    assert "written was 9 and is 8" in capsys.readouterr().err.replace("\n", " ")


def test_texts_that_a_run_wrote_serve_another_layer(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not written again, and their states are those after that layer."""
    texts = {"texts": [], "prompts": [str(saved / "texts.jsonl")], "written": 5, "new_tokens": 6}
    made = [
        recipe(saved, tmp_path / f"E{layer}", steps=2, exit_layer=layer, trunk=str(tmp_path / "trunk"), **texts)
        for layer in (2, 1)
    ]
    runs = [ExitRun(one, CPU) for one in made]
    runs[0].trainer()
    monkeypatch.setattr(
        hidden_state_cache.GeneratedTextCache,
        "_compute",
        broken_at(0, hidden_state_cache.GeneratedTextCache._compute),
    )
    trainer = runs[1].trainer()
    assert trainer.texts.rows(0) > 0
    (folder,) = (tmp_path / "trunk").iterdir()
    records = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()[1:]]
    model, (prompts,) = runs[1].model, runs[1]._prompts
    states = torch.from_file(str(folder / "states-1.bin"), size=(folder / "states-1.bin").stat().st_size // 4)
    begin, width = 0, model.embedding.shape[1]
    for record in records:
        ids = torch.tensor([[*prompts[record["text"]]["input_ids"], *record["tokens"][:-1]]])
        expected = model.decoder(model.embed(ids), model.decoder.new_cache(*ids.shape), 0, 1)[0]
        own = states[begin * width : (begin + len(expected)) * width].view(-1, width)
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
        begin += len(expected)
    assert begin * width == states.numel()


def broken_at(call: int, function: Any) -> Any:
    """A function that is interrupted before its call of that number."""
    calls = iter(range(1000))

    def interrupted(*args: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **named)

    return interrupted


@pytest.fixture(scope="module")
def uninterrupted(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(saved, output)) == 0
    return output


STOPS: dict[str, tuple[Any, str, Any]] = {
    "before the first step": (ExitTrainer, "_step", stopping(0)),
    "between evaluations": (ExitTrainer, "_step", stopping(6)),
    "before the last step": (ExitTrainer, "_step", stopping(11)),
    "while the model runs": (TextCache, "_compute", broken_at(0, TextCache._compute)),
    "before an exit is in its place": (Path, "replace", broken_at(0, Path.replace)),
    "before a checkpoint": (ExitTrainer, "save", broken_at(1, ExitTrainer.save)),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_is_the_uninterrupted_one(
    stop: str, saved: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(*STOPS[stop])
        assert main(arguments(saved, output)) == 130
    assert "--resume continues" in capsys.readouterr().err
    assert main(arguments(saved, output, "--resume")) == 0
    ours, theirs = (load_file(folder / "exit.safetensors") for folder in (output, uninterrupted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    found = [json.loads((folder / "layerskip-exit.json").read_text())["found"] for folder in (output, uninterrupted)]
    assert found[0]["held out"] == found[1]["held out"]


@pytest.mark.parametrize("at", [1, 6, 11])
def test_weights_after_a_resumed_run_are_those_of_the_uninterrupted_one(saved: Path, tmp_path: Path, at: int) -> None:
    """All bits of them, and so are the losses of the steps."""
    trainers, losses = [], []
    for name in ("whole", "resumed"):
        run = ExitRun(recipe(saved, tmp_path / name, steps=14, head_rank=2, draft_layers=2), CPU)
        trainers.append(run.trainer())
        losses.append([])
    whole, resumed = trainers

    def step(state: Any, loss: float) -> None:
        losses[0].append(loss)
        if state.step == at:
            whole.save(tmp_path / "checkpoint.pt")

    whole.train(step, lambda best: None)
    resumed.load(tmp_path / "checkpoint.pt")
    resumed.train(lambda state, loss: losses[1].append(loss), lambda best: None)
    assert losses[1] == losses[0][at:]
    theirs = dict(whole.module.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in resumed.module.named_parameters())


def test_another_tokenizer_or_model_is_not_gone_on_with(
    saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "own")
    with monkeypatch.context() as patched:
        patched.setattr(ExitTrainer, "_step", stopping(6))
        assert main(arguments(tmp_path / "own", tmp_path / "run")) == 130
    again = arguments(tmp_path / "own", tmp_path / "run", "--resume")
    settings = tmp_path / "own" / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "w2"}))
    capsys.readouterr()
    assert main(again) == 2
    assert "digest of the tokenizer was" in " ".join(capsys.readouterr().err.split())


def test_an_exit_is_not_replaced_by_the_run_that_begins_with_it(saved: Path, uninterrupted: Path, capsys: Any) -> None:
    changed = arguments(saved, uninterrupted, "--overwrite", init_exit=str(uninterrupted))
    assert main(changed) == 2
    assert "which this run would replace; give another output" in " ".join(capsys.readouterr().err.split())


def test_two_runs_do_not_share_an_output(saved: Path, uninterrupted: Path, capsys: Any) -> None:
    with locked(recipe(saved, uninterrupted)):
        assert main([*arguments(saved, uninterrupted), "--overwrite"]) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_a_finished_run_is_told(saved: Path, uninterrupted: Path, capsys: Any) -> None:
    args = arguments(saved, uninterrupted)
    assert main([*args, "--resume"]) == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert main(args) == 2
    assert "holds a finished run; give another output, or --overwrite" in capsys.readouterr().err


def test_resuming_with_another_recipe_names_the_key(saved: Path, uninterrupted: Path, capsys: Any) -> None:
    assert main([*arguments(saved, uninterrupted), "--resume", "--learning-rate", "0.5"]) == 2
    assert "learning_rate was 0.001 and is 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["exit.safetensors", "checkpoint.pt", "curve.png", "trunk"])
def test_what_others_put_into_the_output_stays(name: str, saved: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / name).write_text("mine")
    assert main(arguments(saved, output, "--overwrite")) == 2
    assert f"{name} was not written by this command" in capsys.readouterr().err.replace("\n", " ")
    assert (output / name).read_text() == "mine"


def test_an_exit_that_was_changed_is_not_overwritten(
    saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(ExitTrainer, "_step", stopping(6))
        assert main(arguments(saved, output)) == 130
    (output / "exit.safetensors").write_text("mine")
    for more in ("--resume", "--overwrite"):
        assert main(arguments(saved, output, more)) == 2
        assert "is not what this command wrote" in capsys.readouterr().err
    assert (output / "exit.safetensors").read_text() == "mine"


BAD: dict[str, tuple[list[str], str]] = {
    "no texts": (["--texts", "nowhere.jsonl"], "nowhere.jsonl"),
    "exit layer": (["--exit-layer", "9"], "exit_layer must be in 1 … 3 for 4 layers, got 9"),
    "draft tokens": (["--draft-tokens", "1000"], "draft_tokens is 1000, the vocabulary has"),
    "minutes": (["--minutes", "0"], "minutes must be above 0, got 0.0"),
    "nothing to train": (["--draft-layers", "0"], "draft_layers and head_rank are 0"),
    "model": (["--model", "./none"], "no such directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_value(case: str, saved: Path, tmp_path: Path, capsys: Any) -> None:
    args, message = BAD[case]
    assert main([*arguments(saved, tmp_path / "run"), *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_is_named_with_the_nearest(saved: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "recipe.yaml").write_text("learning_rat: 1\n")
    assert main(["train-exit", str(tmp_path / "recipe.yaml")]) == 2
    assert "unknown key 'learning_rat', did you mean 'learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_variation": -0.1}, "total_variation must be in [0, 1], got -0.1"),
        ({"soft": 1.5}, "soft must be in [0, 1], got 1.5"),
        ({"soft": 0.75, "total_variation": 0.5}, "soft + total_variation must be at most 1, got 0.75 + 0.5"),
    ],
)
def test_weights_of_the_loss_are_checked(changes: dict[str, float], message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe(saved, tmp_path, **changes)


@pytest.fixture
def seconds() -> Iterator[float]:
    """Of a clock by which every step takes 6 seconds."""
    return iter(range(0, 10**6, 6))


def test_minutes_end_a_run_with_a_decay(saved: Path, tmp_path: Path, seconds: Iterator[float]) -> None:
    run = ExitRun(recipe(saved, tmp_path, steps=None, minutes=1.0, decay=0.4, eval_every=100), CPU)
    trainer = run.trainer()
    trainer._clock = lambda: next(seconds)
    rates: list[float] = []
    trainer.train(lambda state, loss: rates.append(trainer._optimizer.param_groups[0]["lr"]), lambda best: None)
    assert len(rates) == 10
    assert rates[2:6] == [1e-3] * 4
    assert rates[6:] == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4])


def test_a_run_ends_early_when_nothing_gets_better(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([1.0, 1.2, 1.1, 1.2, 1.3])
    monkeypatch.setattr(
        ExitTrainer, "agreement", lambda self, texts: exit_trainer.Agreement(0.1, (0.1,) * 3, next(scores), 0.1)
    )
    trainer = ExitRun(recipe(saved, tmp_path, steps=100, patience=2, eval_every=1), CPU).trainer()
    better: list[bool] = []
    trainer.train(lambda state, loss: None, better.append)
    assert better == [True, True, False, False]
    assert (trainer.state.best_step, trainer.state.stopped_early) == (2, True)


def written_texts(folder: Path, model: Any, count: int, whole: bool = False) -> GeneratedTextCache:
    prompts = [pair["input_ids"] for pair in pairs_of((4, 7, 5, 7, 3))]
    return GeneratedTextCache(folder, layerskip.models.adapt(model), 2, 5, prompts, count, 6, 3, whole)


@pytest.mark.parametrize("whole", [False, True])
def test_written_texts_are_the_models_own_with_its_states_and_labels(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """As a second pass over them has it, and the tokens as decoding gives them."""
    monkeypatch.setattr(hidden_state_cache, "BATCH", 2)
    made = written_texts(tmp_path / "written", model, 5, whole)
    made.compute()
    prompts = [pair["input_ids"] for pair in pairs_of((4, 7, 5, 7, 3))]
    decoder = layerskip.SelfSpeculativeDecoder(model, 1)
    pairs = []
    for index, prompt in enumerate(prompts):
        plain = decoder.generate(torch.tensor([prompt]), 6, strategy="autoregressive", eos_token_id=[3])
        assert made.new_tokens(index) == plain.new_tokens[0].tolist()
        ids = prompt + made.new_tokens(index)
        pairs.append({"input_ids": ids, "labels": ids if whole else [-100] * len(prompt) + made.new_tokens(index)})
    again = TextCache(tmp_path / "again", layerskip.models.adapt(model), 2, 5, pairs)
    again.compute()
    for index in range(5):
        one, other = made[index], again[index]
        assert one.first == other.first
        assert made.rows(index) == again.rows(index) == len(one.top_k.ids)
        torch.testing.assert_close(one.states, other.states, rtol=1e-4, atol=1e-4)
        assert one.top_k.ids[:, 0].tolist() == other.top_k.ids[:, 0].tolist()
        torch.testing.assert_close(one.top_k.probabilities, other.top_k.probabilities, rtol=1e-2, atol=1e-3)


def test_writing_goes_on_after_a_stop_and_with_more_texts(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_state_cache, "BATCH", 2)
    whole = written_texts(tmp_path / "whole", model, 5)
    whole.compute()

    def stop(texts: int) -> None:
        if texts == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written_texts(tmp_path / "stopped", model, 3).compute(stop)
    ran: list[int] = []
    monkeypatch.setattr(
        GeneratedTextCache,
        "_compute",
        lambda self, indices, run=GeneratedTextCache._compute: ran.extend(indices) or run(self, indices),
    )
    more = written_texts(tmp_path / "stopped", model, 5)
    more.compute()
    assert len(ran) == 3
    for index in range(5):
        assert more.new_tokens(index) == whole.new_tokens(index)
        torch.testing.assert_close(more[index].states, whole[index].states)
    fewer = written_texts(tmp_path / "stopped", model, 1)
    fewer.compute()
    assert len(fewer) == 1
    with pytest.raises(ValueError, match="whole was False and is True"):
        written_texts(tmp_path / "stopped", model, 5, whole=True).compute()


def test_a_run_begins_as_another_exit(tmp_path: Path) -> None:
    """With its tokens and its drafts; an exit of another shape is refused."""
    adapted = layerskip.models.adapt(tiny_model())
    ids = torch.tensor([1, 4, 9, 50])
    before = TrainableExit(adapted, 2, 1, 3, ids, head_rank=2)
    for parameter in before.parameters():
        torch.nn.init.normal_(parameter)
    after = TrainableExit(adapted, 2, 1, 0, ids, head_rank=2)
    after.load_exit(before.exit(torch.float32))
    for (name, one), other in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match=r"init_exit has layer and draft layers \(2, 1\), the recipe has \(1, 1\)"):
        TrainableExit(adapted, 1, 1, 0, ids, head_rank=2).load_exit(before.exit())
    with pytest.raises(ValueError, match="one of the recipe and init_exit has a correction of the head"):
        TrainableExit(adapted, 2, 1, 0, ids).load_exit(before.exit())
