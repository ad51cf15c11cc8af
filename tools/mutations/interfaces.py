"""Bugs of what stands between people and decoding: transformers, the command line."""

from __future__ import annotations

from .mutation import LAYERSKIP, Mutation

BUGS = [
    Mutation(
        "a hole in a mask is padding", "python/layerskip/transformers/compatibility.py",
        "first if first + self.length == len(padded) else -1", "first",
        LAYERSKIP + "transformers/test_transformers_generate.py -k hole",
    ),
    Mutation(
        "a prompt is taken for markup", "python/layerskip/cli/report.py", "autoescape=True", "autoescape=False",
        LAYERSKIP + "cli/test_report.py -k is_text",
    ),
    Mutation(
        "a round's own token is left out of the page", "python/layerskip/cli/report.py",
        "if emitted > accepted:", "if emitted > accepted + 1:", LAYERSKIP + "cli/test_report.py -k every_token",
    ),
    Mutation(
        "another exit gets the decoder that is kept", "python/layerskip/transformers/custom_generate.py",
        "kept.drafting != (draft_head, exit)", "kept.drafting[0] != draft_head",
        LAYERSKIP + "transformers/test_transformers_generate.py -k keeps_its_decoder",
    ),
]  # fmt: skip
