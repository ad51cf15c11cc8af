"""`layerskip train` and the folder that it writes to: no user file is lost, and only the same run resumes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import save_tiny

from layerskip.cli import main
from layerskip.models import load
from layerskip.training import trainer
from layerskip.training.output_dir import RECORD, checkpoints, last_checkpoint, locked
from layerskip.training.recipe import make_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def write_pairs(path: Path, shift: int = 0) -> None:
    lines = [{"prompt": f"w{3 + i % 40} w2", "completion": f"w{4 + shift + i % 40}"} for i in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, its data, a recipe of four steps with a checkpoint after each second, and what it wrote to out."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("finished")
    save_tiny(root / "base")
    write_pairs(root / "pairs.jsonl")
    recipe = {"model": "base", "tasks": ["pairs.jsonl"], "output": "out", "steps": 4, "save_every": 2, "batch_size": 8,
              "exit_layers": [1, 2], "lora_rank": 2, "log_every": 1}  # fmt: skip
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["train", "recipe.yaml"]) == 0
    return root


@pytest.fixture
def there(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, and the current folder."""
    folder = tmp_path / "there"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def unfinished(there: Path) -> None:
    """As a kill after step 2 leaves it."""
    for name in ("adapter", "model", "checkpoint-4"):
        shutil.rmtree(there / "out" / name)
    record = json.loads((there / "out" / RECORD).read_text())
    (there / "out" / RECORD).write_text(json.dumps({**record, "finished": False}))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train(*options: str) -> int:
    flags = [option for option in options if option.startswith("--")]
    pairs = [part for option in options if not option.startswith("--") for part in ("--set", option)]
    return main(["train", "recipe.yaml", *flags, *pairs])


def refused(capsys: pytest.CaptureFixture[str], there: Path, *options: str) -> str:
    """The error of a run that changes no file."""
    before = tree(there)
    capsys.readouterr()
    assert train(*options) == 2
    assert tree(there) == before
    assert sorted(path.name for path in there.iterdir()) == sorted({name.split("/")[0] for name in before})
    return capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_the_model_that_a_run_starts_from_is_not_written_over(
    there: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    """Whether somebody else put it there or an earlier run."""
    shutil.copytree(there / "base", there / "w" / "model")
    (there / "w" / "model" / "NOTES.md").write_text("mine")
    error = refused(capsys, there, "model=w/model", "output=w", *flags)
    assert "model w/model is in w/model, which this run would replace; give another output" in error
    error = refused(capsys, there, "adapter=out/adapter", *flags)
    assert "adapter out/adapter is in out/adapter, which this run would replace" in error
    error = refused(capsys, there, "model=out/checkpoint-4", *flags)
    assert "model out/checkpoint-4 is in out/checkpoint-4" in error


def test_a_model_elsewhere_in_the_output_stays(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(there / "base")
    error = refused(capsys, there, "output=.")
    assert "output . holds model base; give another output, or --overwrite to write beside it" in error
    assert train("output=.", "--overwrite", "steps=1") == 0
    assert tree(there / "base") == before
    assert (there / "model" / "config.json").exists()


def test_a_finished_run_is_replaced_only_when_told(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "out holds a finished run; give another output, or --overwrite" in refused(capsys, there)
    for folder in ("", "adapter", "model", "checkpoint-4"):
        (there / "out" / folder / "NOTES.md").write_text("mine")
    old = tree(there / "out" / "model")
    assert train("--overwrite", "steps=2", "learning_rate=0.1") == 0
    new = tree(there / "out" / "model")
    assert {name for name in new if new[name] != old[name]} == {"model.safetensors", "layerskip-files.json"}
    assert new.keys() == old.keys()
    for folder in ("", "adapter", "model", "checkpoint-4"):
        assert (there / "out" / folder / "NOTES.md").read_text() == "mine"
    assert checkpoints(there / "out") == [Path.cwd() / "out" / "checkpoint-2"]
    assert [path.name for path in (there / "out" / "checkpoint-4").iterdir()] == ["NOTES.md"]


def test_an_older_runs_adapter_does_not_stay_beside_a_full_runs_model(there: Path) -> None:
    assert train("--overwrite", "steps=1", "method=full") == 0
    assert sorted(path.name for path in (there / "out").iterdir()) == ["checkpoint-1", RECORD, "model"]


def test_what_layerskip_did_not_write_is_never_replaced(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = there / "out"
    config = out / "model" / "config.json"
    text = config.read_text()
    config.write_text(text + " ")
    assert "out/model/config.json was changed after layerskip wrote it" in refused(capsys, there, "--overwrite")
    config.write_text(text)
    for name in ("model", "adapter", "checkpoint-7"):
        other = there / f"other-{name}"
        shutil.copytree(there / "base", other / name)
        error = refused(capsys, there, f"output=other-{name}", "--overwrite")
        assert f"other-{name}/{name} exists, and was not written by layerskip" in error
        error = refused(capsys, there, f"output=other-{name}")
        assert "holds an unfinished run" in error if name == "checkpoint-7" else "which this run would write" in error
    (there / "file").write_text("mine")
    assert "file is a file" in refused(capsys, there, "output=file/out")


def test_a_model_that_somebody_puts_there_meanwhile_stays_and_the_training_too(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class _Meanwhile(trainer.Progress):
        def on_train_end(self, args, state, control, **kwargs) -> None:
            shutil.copytree(there / "base", there / "new" / "model")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Progress", _Meanwhile)
        assert train("output=new", "steps=1") == 2
    assert "new/model exists, and was not written by layerskip" in capsys.readouterr().err
    assert tree(there / "new" / "model") == tree(there / "base")
    (there / "new" / "model").rename(there / "mine")
    assert train("output=new", "steps=1", "--resume") == 0
    load(there / "new" / "model")


def test_checkpoints_are_gone_on_with_only_when_told(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tree(there / "out" / "model")
    unfinished(there)
    assert "out holds an unfinished run; --resume to continue it" in refused(capsys, there)
    assert train("--resume", "log_every=2", "save_every=3") == 0
    assert "step 4/4" in capsys.readouterr().out
    assert tree(there / "out" / "model") == whole


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("learning_rate=0.001", "learning_rate was 0.002 and is 0.001"),
        ("seed=3", "seed was 0 and is 3"),
        ("tasks={pairs.jsonl: 1.0}", "tasks was ['pairs.jsonl'] and is {'pairs.jsonl': 1.0}"),
        ("layer_dropout={max: 0.1}", "layer_dropout.max was 0.0 and is 0.1"),
        ("head_sample=4", "head_sample was 0 and is 4"),
        ("interpolate=0.5", "interpolate was 1.0 and is 0.5"),
    ],
)
@pytest.mark.parametrize("is_finished", [False, True], ids=["unfinished", "finished"])
def test_another_recipe_is_not_gone_on_with(
    there: Path, capsys: pytest.CaptureFixture[str], change: str, difference: str, is_finished: bool
) -> None:
    if not is_finished:
        unfinished(there)
    error = refused(capsys, there, "--resume", change, "steps=5")
    assert "out was trained with another recipe: " in error
    assert difference in error
    assert "steps was 4 and is 5" in error
    assert error.count(" was ") == 3


def test_other_data_under_the_same_name_is_not_gone_on_with(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished(there)
    write_pairs(there / "pairs.jsonl", shift=1)
    assert "digest of the examples was " in refused(capsys, there, "--resume")


def test_checkpoints_without_their_recipe_are_not_gone_on_with(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished(there)
    (there / "out" / RECORD).unlink()
    assert f"out has no {RECORD}" in refused(capsys, there, "--resume")
    (there / "out" / RECORD).write_text("prose")
    assert f"{RECORD}: not JSON" in refused(capsys, there, "--resume")
    (there / "out" / RECORD).write_text("{}")
    assert f"{RECORD} is no record of a training run" in refused(capsys, there)


def test_a_finished_run_says_so(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(there)
    capsys.readouterr()
    assert train("--resume") == 0
    printed = capsys.readouterr().out
    assert "this run is finished, nothing is left to train; it wrote out/adapter, out/model" in printed
    assert tree(there) == before
    shutil.rmtree(there / "out" / "model")
    assert train("--resume") == 0, "what it wrote is not there any more, but the last checkpoint is"
    assert tree(there)["out/model/model.safetensors"] == before["out/model/model.safetensors"]


def test_an_interrupted_run_says_how_to_go_on(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tree(there / "out" / "model")

    class _Interrupted(trainer.Progress):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Progress", _Interrupted)
        assert train("output=new") == 130
    assert "interrupted; the same command with --resume continues from new/checkpoint-2" in capsys.readouterr().err
    assert train("output=new", "--resume") == 0
    assert tree(there / "new" / "model") == whole


def test_a_kill_before_the_results_trains_no_further_step(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tree(there / "out" / "model")
    for name in ("adapter", "model"):
        shutil.rmtree(there / "out" / name)
    record = json.loads((there / "out" / RECORD).read_text())
    (there / "out" / RECORD).write_text(json.dumps({**record, "finished": False}))
    checkpoint = tree(there / "out" / "checkpoint-4")
    capsys.readouterr()
    assert train("--resume") == 0
    assert "step " not in capsys.readouterr().out
    assert tree(there / "out" / "model") == whole
    assert tree(there / "out" / "checkpoint-4") == checkpoint
    assert last_checkpoint(there / "out") == there / "out" / "checkpoint-4"


def test_two_runs_do_not_share_an_output(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(make_recipe({"output": "out"})):
        before = tree(there)
        for options in ((), ("--overwrite",), ("--resume",)):
            assert train(*options) == 2
            assert "another process is writing" in capsys.readouterr().err
        assert tree(there) == before


def test_another_base_model_under_the_same_name_is_not_gone_on_with(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LoRA's checkpoints hold the adapter alone. Records of older versions lack the digest."""
    unfinished(there)
    shutil.rmtree(there / "base")
    save_tiny(there / "base", seed=1)
    assert "digest of the weights was " in refused(capsys, there, "--resume")
    path = there / "out" / RECORD
    record = json.loads(path.read_text())
    del record["data"]["digest of the weights"]
    path.write_text(json.dumps(record))
    assert train("--resume") == 0
    assert "layerskip train: an older version did not record the digest of the weights" in capsys.readouterr().err


def test_a_run_shorter_than_log_every_prints_its_loss(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("output=new", "steps=2", "log_every=10") == 0
    assert re.search(r"step 2/2 .* loss \d", capsys.readouterr().out)


def test_a_checkpoint_without_a_manifest_is_not_whole(there: Path) -> None:
    assert last_checkpoint(there / "out") == there / "out" / "checkpoint-4"
    (there / "out" / "checkpoint-4" / "layerskip-files.json").unlink()
    assert last_checkpoint(there / "out") == there / "out" / "checkpoint-2"
    assert last_checkpoint(there / "nothing") is None


def test_resume_and_overwrite_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--resume", "--overwrite"])
    assert "not allowed with" in capsys.readouterr().err
