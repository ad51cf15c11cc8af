"""The LayerSkip training recipe (arXiv 2404.16710) as parts, and a Trainer that puts them together."""

from .convert import Conversion, convert, revert
from .dataset import Collator, LengthBuckets, encode, read_pairs
from .dropout import LayerDropout, apply_to_rows, dropout_scale, layer_dropout_rates
from .exits import AllExits, Curriculum, GradualCurriculum, RandomExits, RotationalCurriculum, early_exit_weights
from .loss import EarlyExitLoss, ExitLosses
from .survey import ExitSurvey, survey_exits

__all__ = [
    "AllExits",
    "Collator",
    "Conversion",
    "Curriculum",
    "EarlyExitLoss",
    "ExitLosses",
    "ExitSurvey",
    "GradualCurriculum",
    "LayerDropout",
    "LengthBuckets",
    "RandomExits",
    "RotationalCurriculum",
    "apply_to_rows",
    "convert",
    "dropout_scale",
    "early_exit_weights",
    "encode",
    "layer_dropout_rates",
    "read_pairs",
    "revert",
    "survey_exits",
]
