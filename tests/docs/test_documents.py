"""Run the snippets of the README and all pages, on small models and SmolLM2, and check their commands.

Blocks of ``python`` run, in the order of their page; those of ``py`` are fragments of files.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import re
import shlex
import textwrap
from importlib.util import find_spec
from pathlib import Path

import gguf
import gguf_files
import helpers
import pytest
import quantized_checkpoints as layouts
import torch
import yaml
from tokenizers_of import byte_level

import layerskip
import layerskip_kernels
from layerskip.cli import arguments
from layerskip.models import save
from layerskip.training.recipe import exit_recipe
from tools import recipe_reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
# What would take minutes or a network, and its stand-in.
SHORTER = {
    "max_steps=300": "max_steps=1",
    "per_device_train_batch_size=8": "per_device_train_batch_size=1",
    "facebook/layerskip-llama3.2-1B": "DIR",
    "OWNER/layerskip": str(ROOT / "examples/custom_generate"),
    "max_new_tokens=64": "max_new_tokens=16",
    "[:2000]": "[:4]",
    '"smollm2", weights="native"': '"model.gguf", weights="native"',
}


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def write_models(folder):
    """Write the models that pages call DIR, DIR-AWQ, DIR-int4 and model.gguf."""
    tokenizer = byte_level()
    plain = layouts.tiny(vocab_size=len(tokenizer), num_hidden_layers=6)
    plain.save_pretrained(folder / "DIR")
    tokenizer.save_pretrained(folder / "DIR")
    layouts.write(folder / "DIR-AWQ", layouts.tiny(), layouts.awq(128))
    gguf_files.write(folder / "model.gguf", plain, {"": gguf.GGMLQuantizationType.Q8_0})
    (folder / "DIR-int4").mkdir()
    save(layerskip.adapt(layouts.tiny()).quantize("int4"), folder / "DIR-int4")
    helpers.tiny_tokenizer().save_pretrained(folder / "DIR-int4")


def tensors_of_a_round():
    """Return six layers as wide as the page's head, and a draft head of 64 tokens in int8."""
    d, heads, kv_heads, size, ffn, layers, length = 576, 9, 3, 64, 32, 6, 16
    shapes = [(d,), (heads * size, d), (kv_heads * size, d), (kv_heads * size, d), (d, heads * size), (d,), (ffn, d),
              (ffn, d), (d, ffn)]  # fmt: skip
    angles = torch.outer(torch.arange(length + 8.0), torch.arange(size // 2) / size)
    return {
        "weights": [0.02 * torch.randn(shape).bfloat16() for _ in range(layers) for shape in shapes],
        "k_cache": torch.zeros(layers, 1, kv_heads, length, size, dtype=torch.bfloat16),
        "v_cache": torch.zeros(layers, 1, kv_heads, length, size, dtype=torch.bfloat16),
        "cos": angles.cos(), "sin": angles.sin(), "seq_lens": torch.zeros(1, dtype=torch.int64),
        "token": torch.tensor([7]), "embedding": torch.randn(49152, d).bfloat16(), "tokens": torch.arange(64),
        "int8": torch.randint(-127, 128, (64, d), dtype=torch.int8), "scale": torch.full((64,), 1e-3),
    }  # fmt: skip


# The names that a page takes from its reader; all others it defines itself.
GIVEN = {
    "docs/kernels.md": tensors_of_a_round,
    "docs/quantization.md": lambda: {"inputs": {"input_ids": torch.tensor([[3, 7, 12]])}},
}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_snippets_run(page, tmp_path, monkeypatch, capsys):
    code = blocks(page, "python")
    if any("smollm2" in block for block in code) and find_spec("layerskip_smollm2") is None:
        pytest.skip("the model of the pages is not installed: pip install ./examples/smollm2")
    monkeypatch.chdir(tmp_path)
    if any("DIR" in block or "facebook/" in block for block in code):
        write_models(tmp_path)
    isa = layerskip_kernels.cpu_isa()
    names = GIVEN.get(name_of(page), dict)()
    try:
        for block in code:
            for long, short in SHORTER.items():
                block = block.replace(long, short)
            if block.startswith(">>>"):
                (example,) = doctest.DocTestParser().get_examples(block)
                capsys.readouterr()
                exec(example.source, names)
                assert capsys.readouterr().out.startswith(example.want.splitlines()[0])
            else:
                exec(compile(block, str(page), "exec"), names)
    finally:
        layerskip_kernels.set_cpu_isa(isa)
    printed = capsys.readouterr().out
    if name_of(page) in ("README.md", "examples/smollm2/README.md"):
        assert "[IN:HassTurnOn" in printed
    if name_of(page) == "README.md":
        rate = re.search(r"(\d+)% of the drafts accepted", printed)
        assert rate is not None
        assert int(rate[1]) > 50


def lines_of(page):
    """Yield the command lines of a page's blocks, with continued lines joined."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```[a-z]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())


def commands(pattern):
    """Return the page and the arguments of every line that matches."""
    found = [(page, match[1]) for page in PAGES for line in lines_of(page) if (match := re.match(pattern, line))]
    return [pytest.param(page, line, id=f"{page.name}: {line[:60]}") for page, line in found]


@pytest.mark.parametrize(("page", "line"), commands(r"(?:\.venv/bin/)?(?:torchrun .*-m layerskip\.cli|layerskip) (.*)"))
def test_layerskip_commands_parse(page, line):
    arguments.parse(shlex.split(line, comments=True))


@pytest.mark.parametrize(("page", "line"), commands(r"make (.*)"))
def test_make_targets_exist(page, line):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for word in shlex.split(line, comments=True):
        if "=" not in word and not word.startswith("-"):
            assert word in targets


def modules():
    """Return every ``python -m`` of the repository's own modules, in blocks and in the text."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for match in re.finditer(r"python -m ((?:benchmarks|tools|layerskip\.training)[\w.]*)([^`#\n]*)", text):
            found[f"{page.name}: {match[1]}{match[2]}"] = match
    return [pytest.param(match[1], match[2], id=name[:80]) for name, match in found.items()]


@pytest.mark.parametrize(("module", "options"), modules())
def test_modules_have_their_options(module, options):
    path = ROOT / ("python" if module.startswith("layerskip") else "") / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    for option in re.findall(r"(?<= )--[a-z][\w-]*", re.sub('"[^"]*"', "", options)):
        assert f'"{option}"' in source, f"{module} has no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_exist(page):
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extras in re.findall(r"layerskip-kernels\[([\w,-]+)\]", page.read_text(encoding="utf-8")):
        assert set(extras.split(",")) <= set(known)


def public_names():
    """Return every dotted name of the packages in code, and what the reference pages list."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL) + re.findall(r"^::: .*$", text, re.MULTILINE)
        for name in re.findall(r"(?<![\w./-])layerskip(?:_kernels)?(?:\.[A-Za-z]\w*)+", "\n".join(code)):
            if name.rpartition(".")[2] not in ("json", "safetensors", "yaml"):
                found.add(name)
    return sorted(found)


@pytest.mark.parametrize("name", public_names())
def test_public_names_exist(name):
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(".".join(parts[:number]))
        found = getattr(found, part)


def test_the_recipe_reference_is_current():
    assert recipe_reference.page() == recipe_reference.PAGE.read_text(encoding="utf-8"), (
        "run python -m tools.recipe_reference"
    )


def test_recipes_of_the_training_page_are_read(tmp_path):
    for number, block in enumerate(blocks(ROOT / "docs/training.md", "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        assert exit_recipe(path, {}).prompts == yaml.safe_load(block)["prompts"]
