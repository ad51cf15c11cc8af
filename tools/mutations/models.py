"""Bugs of how models are read and computed."""

from __future__ import annotations

from .mutation import LAYERSKIP, Mutation

MODELS = "python/layerskip/models/"
FAMILIES, KEPT = LAYERSKIP + "models/test_model_families.py", LAYERSKIP + "models/test_model_families_kept.py"
COMPOSED = MODELS + "generic_layers.py"

BUGS = [
    Mutation(
        "the rows of q and k of a mistral in GGUF stay in llama.cpp's order", MODELS + "checkpoints/gguf.py",
        '_PERMUTED = ("llama", "mistral")', '_PERMUTED = ("llama",)',
        LAYERSKIP + "models/test_gguf.py -k packed_weights",
    ),
    Mutation(
        "zero points that loading has converted are read as the file's", MODELS + "checkpoints/hf.py",
        "kernel.qzero_format() == 2", "False", LAYERSKIP + "transformers/test_transformers_quantized.py -k zero_points",
    ),
    Mutation(
        "scales that change in place leave their packed copy as it is", MODELS + "hf_checks.py",
        "self._weights if quantized else []", "[]",
        LAYERSKIP + "transformers/test_transformers_quantized.py -k change_in_place",
    ),
    Mutation(
        "a kernel that has repacked its tensors is read", MODELS + "adaptation.py",
        "kind not in (*_PLAIN,", "False and (*_PLAIN,",
        LAYERSKIP + "transformers/test_transformers_quantized.py -k what_is_refused",
    ),
    Mutation(
        "a decoder keeps the number of layers of its model's configuration", MODELS + "hf_checks.py",
        "_num_layers(model) == self._num_layers and ", "",
        LAYERSKIP + "models/test_model_changes.py -k that_are_called",
    ),
    Mutation(
        "a module of somebody's own class is taken for the model's", MODELS + "architectures.py",
        "if name and not kind", "if False and not kind",
        LAYERSKIP + "models/test_model_changes.py -k class_of_ones_own",
    ),
    Mutation(
        "a window is one position too long", COMPOSED, "positions - window + 1", "positions - window",
        FAMILIES + " -k long_texts and gemma3",
    ),
    Mutation(
        "the activation of several rows at once", COMPOSED, "not x.is_cpu or not len(x)", "len(x) >= 0",
        FAMILIES + " -k rows_bits and gemma3",
    ),
    Mutation(
        "a layer without rotary embedding has one", MODELS + "architectures.py",
        "0 if uses else 1 for uses", "0 for uses",
        FAMILIES + " -k every_split and smollm3",
    ),
    Mutation(
        "eps does not follow the scale of the states", MODELS + "architectures.py",
        "config.rms_norm_eps / residual**2",
        "config.rms_norm_eps / residual", FAMILIES + " -k small_states",
    ),
    Mutation(
        "norms are computed from the weights of the first call", MODELS + "layers.py",
        "for name, weight in self.layer_parameters(number).items():", "for name, weight in ():",
        KEPT + " -k change_in_place and gemma3",
    ),
    Mutation(
        "the final norm is that of the first call", MODELS + "model.py", "        self.head.refresh()\n", "",
        KEPT + " -k change_in_place and granite",
    ),
    Mutation(
        "views of joined matrices stay where they were", MODELS + "layers.py",
        "not JOINED.keys().isdisjoint(parameters[0])", "False", KEPT + " -k other_memory and phi3",
    ),
    Mutation(
        "positions past a window are computed", MODELS + "rotary.py", "cos[max_positions:] = torch.nan", "pass",
        KEPT + " -k give_no_token",
    ),
    Mutation(
        "experts share more than 1", COMPOSED, "    if config.normalize_experts:\n",
        "    if not config.normalize_experts:\n",
        FAMILIES + " -k every_split and qwen3moe",
    ),
    Mutation(
        "each layer is calibrated behind plain ones", MODELS + "quantize.py", "self._run(number, packed, None)",
        "self._run(number, layer, None)", LAYERSKIP + "models/test_calibration.py -k packed_ones",
    ),
    Mutation(
        "calibration looks at the last text alone", MODELS + "quantize.py",
        "moments.get(name, 0) + rows.T @ rows", "rows.T @ rows",
        LAYERSKIP + "models/test_calibration.py -k packed_ones",
    ),
    Mutation(
        "an index may name files of other directories", MODELS + "files.py", 're.search(r"[/\\\\:\\0]", name)', "False",
        LAYERSKIP + "models/test_file_fields.py -k files_elsewhere",
    ),
    Mutation(
        "numbers in files are not bounded", MODELS + "files.py", "self.minimum <= number <= self.maximum",
        "number <= self.maximum",
        LAYERSKIP + "models/test_file_fields.py -k test_config",
    ),
    Mutation(
        "text of the vocabulary controls the terminal", "python/layerskip/cli/rendering.py",
        "printable(text) if sys.stdout.isatty() else text", "text",
        LAYERSKIP + "models/test_file_fields.py -k vocabulary",
    ),
    Mutation(
        "error messages control the terminal", "python/layerskip/_imports.py", "\\x0e-\\x1f", "\\x0e-\\x1a",
        LAYERSKIP + "models/test_file_fields.py -k Printable",
    ),
]  # fmt: skip
