"""The same weights in the forms that the peers read: a directory of transformers, GGUF files of several types."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants
from torch import Tensor

from layerskip.cli.export import first_layers
from layerskip.models import adapt, load, save
from layerskip.models.checkpoints.gguf import gguf_name

TYPES = ("bf16", "f16", "q8_0", "q4_0", "q4_1")


class Forms:
    """A model in every form, each written when it is first asked for, under a name that has a digest of its weights.

    Parameters
    ----------
    name : str
        A model of Llama's architecture.
    folder : Path
    like : Path
        A GGUF of the same shape, whose tokenizer and settings the files get.
    """

    def __init__(self, name: str, folder: Path, like: Path) -> None:
        self._model, self.tokenizer = load(name, torch.bfloat16)
        digest = hashlib.sha256(like.read_bytes())
        for weight in self._model.state_dict().values():
            digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
        self._stem, self._like = folder / f"{name}-{digest.hexdigest()[:12]}", like

    def directory(self) -> Path:
        """As transformers reads it, in bf16."""
        if not self._stem.exists():
            with _unfinished(self._stem) as folder:
                self._model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
        return self._stem

    def packed(self, weights: str) -> Path:
        """As `layerskip quantize` writes it; always anew, as weights are packed now."""
        target = Path(f"{self._stem}.{weights}")
        shutil.rmtree(target, ignore_errors=True)
        with _unfinished(target) as folder:
            save(adapt(self._model).quantize(weights), folder, self.tokenizer)
        return target

    def gguf(self, kind: str, layers: int | None = None) -> Path:
        """As a GGUF, whole or of the first layers with norm and head; its matrices have one of `TYPES`.

        Four-bit ones have embedding and head in Q8_0, as is usual.
        """
        name = f"{kind}.gguf" if layers is None else f"first-{layers}.{kind}.gguf"
        target = Path(f"{self._stem}.{name}")
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            model = self._model if layers is None else first_layers(self._model, layers)
            write(model, kind, GGUFReader(str(self._like)), unfinished)
            unfinished.rename(target)
        return target


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A directory to fill, which then gets its name."""
    folder = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    folder.rename(target)


def write(model: Any, kind: str, like: GGUFReader, target: Path) -> None:
    """Write the GGUF of a transformers model."""
    writer = GGUFWriter(str(target), "llama")
    _copy_settings(like, writer)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.upper()}"])
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.named_parameters():
        matrix = weight.detach().float()
        if (found := re.search(r"self_attn\.(q_proj|k_proj)\.weight$", name)) is not None:
            matrix = _side_by_side(matrix, heads[found[1]])
        own = "q8_0" if kind.startswith("q4") and ("embed" in name or "lm_head" in name) else kind
        made = GGMLQuantizationType[own.upper()] if matrix.dim() == 2 else GGMLQuantizationType.F32
        data = quants.quantize(np.ascontiguousarray(matrix.numpy()), made)
        writer.add_tensor(gguf_name(name), data, raw_dtype=made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Rows (i, i + C/2) of a head, which rotate together, next to each other, as llama.cpp keeps them."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _copy_settings(like: GGUFReader, writer: GGUFWriter) -> None:
    """All that is not about tensors' types or the number of layers."""
    own = ("general.architecture", "general.file_type", "llama.block_count")
    for field in like.fields.values():
        if field.name.startswith("GGUF.") or field.name in own:
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
