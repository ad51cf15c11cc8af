"""The same weights in the forms that the peers read: a directory of transformers, GGUF files of several types."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants
from torch import Tensor

from layerskip.models import load
from layerskip.models.checkpoints.gguf import gguf_name

TYPES = {"bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}
_FILE_TYPES = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "q4_1": "MOSTLY_Q4_1"}


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
            unfinished = self._stem.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            self._model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)
            unfinished.rename(self._stem)
        return self._stem

    def gguf(self, kind: str) -> Path:
        """As a GGUF whose matrices have one of `TYPES`; four-bit ones with embedding and head in Q8_0, as is usual."""
        target = Path(f"{self._stem}.{kind}.gguf")
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            write(self._model, kind, GGUFReader(str(self._like)), unfinished)
            unfinished.rename(target)
        return target


def write(model: Any, kind: str, like: GGUFReader, target: Path) -> None:
    """Write the GGUF of a transformers model."""
    writer = GGUFWriter(str(target), "llama")
    _copy_settings(like, writer)
    writer.add_file_type(LlamaFileType[_FILE_TYPES[kind]])
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.named_parameters():
        matrix = weight.detach().float()
        if (found := re.search(r"self_attn\.(q_proj|k_proj)\.weight$", name)) is not None:
            matrix = _side_by_side(matrix, heads[found[1]])
        own = "q8_0" if kind.startswith("q4") and ("embed" in name or "lm_head" in name) else kind
        made = GGMLQuantizationType[TYPES[own]] if matrix.dim() == 2 else GGMLQuantizationType.F32
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
    """All that is not about tensors' types."""
    for field in like.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
