"""Bugs of drafting inside vLLM; their tests run in the environment of ``make test-vllm``."""

from __future__ import annotations

from .mutation import VLLM, Mutation

DRAFTER = "python/layerskip/vllm/"
ENGINE, RANKS, DRAFT_LAYERS = VLLM + "test_engine.py", VLLM + "test_ranks.py", VLLM + "test_draft_layers.py"
SETTINGS = VLLM + "test_settings.py"

BUGS = [
    Mutation(
        "the last row of a sequence may be a rejected one", DRAFTER + "rows.py",
        "index = torch.where(slots[:total] < 0, -1, index)", "index = index", ENGINE + " -k left_out",
    ),
    Mutation(
        "the first row of a prompt drafts, in vLLM", DRAFTER + "rows.py", '"amax")', '"amin", include_self=False)',
        ENGINE + " -k left_out",
    ),
    Mutation(
        "the row that drafts does not see itself, in vLLM", DRAFTER + "rows.py", "(positions[rows] + 1)",
        "(positions[rows])", ENGINE + " -k left_out",
    ),
    Mutation(
        "every rank names the first rank's tokens", DRAFTER + "head.py", "(token + self._first).float()",
        "token.float()", RANKS,
    ),
    Mutation(
        "a state that is not finite drafts no token", DRAFTER + "head.py", "token = token.clamp_min(0)",
        "token = token", RANKS,
    ),
    Mutation(
        "the padding of a vocabulary is drafted", DRAFTER + "head.py",
        "lm_head.weight.detach()[: shard.num_org_elements]", "lm_head.weight.detach()",
        VLLM + "test_draft_head.py -k padding",
    ),
    Mutation(
        "a rank has a row of the next one", DRAFTER + "head.py", "(mine < whole.num_rows)",
        "(mine <= whole.num_rows)", RANKS,
    ),
    Mutation("a rank has rows of the one before", DRAFTER + "head.py", "(mine >= 0) & ", "", RANKS),
    Mutation(
        "every rank corrects with the first rank's rows", DRAFTER + "head.py",
        "exit.head_up[self._first : self._first + whole.num_rows]", "exit.head_up[: whole.num_rows]", RANKS,
    ),
    Mutation(
        "one exit's graph serves another", DRAFTER + "draft.py",
        'compiled = {"exit_layer": exit_layer, "draft_layers": draft_layers, "norm": norm}',
        'compiled = {"norm": norm}',
        VLLM + "test_compiled.py -k another",
    ),
    Mutation(
        "an exit's norm is the model's, in vLLM", DRAFTER + "draft.py",
        "    norm.weight.data.copy_(exit.norm_weight)\n", "", DRAFT_LAYERS + " -k norm",
    ),
    Mutation(
        "draft layers read the last rows alone", DRAFTER + "draft.py",
        "every_row = len(draft_layers) > 0 or vllm_config",
        "every_row = vllm_config", DRAFT_LAYERS + " -k chunked",
    ),
    Mutation(
        "the drafter has a cache of its own", DRAFTER + "draft.py",
        "stand_in.layer_name, stand_in.kv_sharing_target_layer_name = name, attention.layer_name",
        "stand_in.layer_name = name", ENGINE + " -k owns",
    ),
    Mutation(
        "drafts are drawn from states that are not normed", DRAFTER + "draft.py",
        "target.compute_logits(hidden if self._head is None else self._norm(hidden))",
        "target.compute_logits(hidden)", ENGINE + " -k drawn",
    ),
    Mutation(
        "draft layers are quantized as the model is", DRAFTER + "draft_layers.py",
        "    config.quant_config = None\n", "",
        DRAFT_LAYERS + " -k plain_and",
    ),
    Mutation(
        "draft layers choose their own attention", DRAFTER + "draft_layers.py",
        "    config.attention_config = replace(vllm_config.attention_config, backend=backend)\n", "",
        DRAFT_LAYERS + " -k plain_and",
    ),
    Mutation(
        "an exit's file is a file of weights", DRAFTER + "loader.py",
        "others = (draft_model.FILE_NAME, exit.FILE_NAME)", "others = (draft_model.FILE_NAME,)",
        VLLM + "test_exported.py -k trained",
    ),
    Mutation(
        "greedy requests keep their temperature of 0", DRAFTER + "sampling.py",
        "x.masked_fill(x == replace_from, replace_to).repeat", "x.repeat", VLLM + "test_sampling.py -k defect",
    ),
    Mutation(
        "a tuned exit goes before the layer that is asked for", DRAFTER + "settings.py",
        '([] if "exit_layer" in options else ["exit", "exit_layer"])', '["exit", "exit_layer"]', SETTINGS,
    ),
    Mutation(
        "what the model says goes before the user", DRAFTER + "settings.py",
        "values = {**_known(options, config, model), **split(options)[0]}",
        "values = {**split(options)[0], **_known(options, config, model)}", SETTINGS,
    ),
]  # fmt: skip
