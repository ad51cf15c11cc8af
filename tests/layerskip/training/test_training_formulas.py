"""Rates, weights and curricula against values computed by hand, dropout against its statistics, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from layerskip.training import (
    AllExits,
    GradualCurriculum,
    LayerDropout,
    RandomExits,
    RotationalCurriculum,
    ShallowSteps,
    apply_to_samples,
    dropout_scale,
    early_exit_weights,
    layer_dropout_rates,
)
from layerskip.training.trainer import ExitMeter

TOLERANCES = {"formula": 1e-6}  # fp32 weights


def test_dropout_rates_by_hand() -> None:
    # L = 5: 2^(l/4) - 1 is 0, 0.18921, 0.41421, 0.68179, 1
    assert layer_dropout_rates(5, 0.2) == pytest.approx([0, 0.037841, 0.082843, 0.136359, 0.2], abs=1e-6)
    assert layer_dropout_rates(5, 0.2, "linear") == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert layer_dropout_rates(3, 0.2, "uniform") == [0.2] * 3
    assert layer_dropout_rates(5, 0.2, "step") == [0, 0, 0, 0.2, 0.2]
    assert layer_dropout_rates(3, 0.5, [0.0, 0.5, 0.25]) == [0.0, 0.5, 0.25]
    assert layer_dropout_rates(1, 0.2) == [0.0]


def test_time_scale_by_hand() -> None:
    assert [dropout_scale(t, 3, "constant") for t in range(3)] == [1, 1, 1]
    assert [dropout_scale(t, 3, "exponential") for t in range(3)] == pytest.approx([0, math.sqrt(2) - 1, 1])


def test_paper_weights_by_hand() -> None:
    # L = 4, scale 0.5, l = E - 1: e(0) = 0, e(1) = 0.5, e(2) = 0.5 (1 + 2) = 1.5, e(3) = 3 + 0.5 (1 + 2) = 4.5
    expected = torch.tensor([0, 0.5, 1.5, 4.5]) / 6.5
    torch.testing.assert_close(early_exit_weights([1, 2, 3, 4], 4, "paper", 0.5), expected)
    torch.testing.assert_close(early_exit_weights([4, 2], 4, "paper", 0.5), torch.tensor([0.9, 0.1]))
    torch.testing.assert_close(early_exit_weights([2, 4], 4, "paper", 0.0), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("kind", "raw"),
    [("uniform", [1, 1]), ("linear", [4, 9]), ("sqrt", [2, 3]), ("inverse", [1 / 4, 1 / 9])],
)
def test_other_weights_by_hand(kind: str, raw: list[float]) -> None:
    torch.testing.assert_close(early_exit_weights([4, 9], 10, kind), torch.tensor(raw) / sum(raw))
    low, last = early_exit_weights([4, 10], 10, kind, 0.5), early_exit_weights([4, 10], 10, kind, 1.0)
    assert low[0] / low[1] == pytest.approx(float(last[0] / last[1]) / 2, rel=TOLERANCES["formula"])


def test_rotational_enables_every_interval_shifted_by_one() -> None:
    curriculum = RotationalCurriculum(8, interval=3)
    assert [curriculum.enabled(t) for t in range(4)] == [(1, 4, 7, 8), (2, 5, 8), (3, 6, 8), (1, 4, 7, 8)]


def test_gradual_opens_from_the_last_down() -> None:
    # L = 4, T = 16: one more every 16 / 8 = 2 steps
    enabled = [GradualCurriculum(4, 16).enabled(t) for t in range(16)]
    assert enabled == [(4,)] * 2 + [(3, 4)] * 2 + [(2, 3, 4)] * 2 + [(1, 2, 3, 4)] * 10


def test_random_exits_are_the_same_again_and_all_come_up() -> None:
    enabled = [RandomExits(30, [8, 3, 6, 4], 2, seed=1).enabled(t) for t in range(50)]
    assert enabled == [RandomExits(30, [3, 4, 6, 8], 2, seed=1).enabled(t) for t in range(50)]
    assert all(len(exits) == 3 and exits[-1] == 30 and list(exits) == sorted(exits) for exits in enabled)
    assert len(set(enabled)) == 6
    assert enabled != [RandomExits(30, [3, 4, 6, 8], 2, seed=2).enabled(t) for t in range(50)]


def test_the_full_depth_is_always_enabled() -> None:
    for curriculum in (
        AllExits(6, [2]),
        RandomExits(6, [2, 6], 1),
        RotationalCurriculum(6, 2),
        GradualCurriculum(6, 9),
    ):
        assert all(curriculum.enabled(t)[-1] == 6 for t in range(12))


def test_a_share_of_the_steps_is_shallow() -> None:
    inner = RandomExits(30, [2, 3, 4, 6], 2, seed=1)
    curriculum, steps = ShallowSteps(inner, 0.6, seed=1), range(2000)
    enabled = [curriculum.enabled(t) for t in steps]
    assert enabled == [ShallowSteps(inner, 0.6, seed=1).enabled(t) for t in steps]
    assert enabled != [ShallowSteps(inner, 0.6, seed=2).enabled(t) for t in steps]
    assert all(exits in (inner.enabled(t), inner.enabled(t)[:-1]) for t, exits in enumerate(enabled))
    shallow = sum(exits[-1] != 30 for exits in enabled) / 2000
    assert abs(shallow - 0.6) <= 4 * math.sqrt(0.6 * 0.4 / 2000)  # four standard deviations
    pairs = {exits for exits in enabled if exits[-1] != 30}
    assert len(pairs) == 6  # which exits a step has does not hang on whether it is shallow
    gradual = ShallowSteps(GradualCurriculum(4, 16), 0.999)
    assert {gradual.enabled(t) for t in range(2)} == {(4,)}


def test_dropout_statistics_over_ten_thousand_draws() -> None:
    rates = layer_dropout_rates(6, 0.4)
    dropout = LayerDropout(rates, seed=3)
    dropped = 1 - torch.stack([dropout.draw(t, 4).float() for t in range(2500)])  # [steps, L, B]
    count = dropped.shape[0] * dropped.shape[2]
    for layer, rate in enumerate(rates):
        bound = 4 * math.sqrt(rate * (1 - rate) / count)  # four standard deviations
        assert abs(dropped[:, layer].mean() - rate) <= bound
    samples = dropped[:, -1].T  # samples are drawn on their own: no correlation beyond 4 / sqrt(n)
    assert torch.corrcoef(samples).triu(1).abs().max() <= 4 / math.sqrt(dropped.shape[0])


def test_draws_are_a_function_of_seed_step_and_micro_batch() -> None:
    one, two = LayerDropout([0.5] * 4, seed=7), LayerDropout([0.5] * 4, seed=7)
    torch.manual_seed(0)
    first = one.draw(5, 8)
    torch.manual_seed(1)
    assert torch.equal(first, two.draw(5, 8))
    others = (one.draw(6, 8), one.draw(5, 8, micro_batch=1), LayerDropout([0.5] * 4, seed=8).draw(5, 8))
    assert not any(torch.equal(first, other) for other in others)


def test_rates_grow_with_time() -> None:
    dropout = LayerDropout([1.0] * 2, total_steps=3, scale="exponential")
    kept = [dropout.draw(t, 1000).float().mean().item() for t in range(3)]
    assert kept[0] == 1
    assert kept[1] == pytest.approx(2 - math.sqrt(2), abs=0.05)  # 4 standard deviations of 2000 draws are 0.044
    assert kept[2] == 0


def test_rows_of_the_kept_run_as_if_alone_and_the_rest_pass() -> None:
    hidden, mask, cos = torch.randn(4, 3, 2), torch.randn(4, 1, 3, 3), torch.randn(1, 3, 2)
    rows = torch.tensor([0, 3])
    seen = {}

    def layer(hidden: torch.Tensor, mask: torch.Tensor, *, embeddings: tuple, positions: torch.Tensor) -> torch.Tensor:
        seen.update(mask=mask, embeddings=embeddings, positions=positions)
        return hidden * mask.sum((1, 2))[:, :1, None] + embeddings[0]

    arguments = {"embeddings": (cos, hidden), "positions": torch.arange(4)}
    out = apply_to_samples(layer, rows, hidden, mask, **arguments)
    alone = layer(hidden[rows], mask[rows], embeddings=(cos, hidden[rows]), positions=torch.arange(4))
    assert torch.equal(out[rows], alone)
    assert torch.equal(out[1:3], hidden[1:3])
    apply_to_samples(layer, rows, hidden, mask, **arguments)
    assert torch.equal(seen["mask"], mask[rows])
    assert torch.equal(seen["embeddings"][1], hidden[rows])
    assert torch.equal(seen["embeddings"][0], cos)  # broadcast over samples, so not per sample
    assert torch.equal(seen["positions"], torch.arange(4))  # one dimension: positions, not samples


def test_a_layer_that_all_samples_skip_still_gives_its_parameters_a_gradient() -> None:
    layer = torch.nn.Linear(4, 4)
    hidden = torch.randn(3, 4, requires_grad=True)
    out = apply_to_samples(layer, torch.tensor([], dtype=torch.long), hidden)
    assert torch.equal(out, hidden)
    out.sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(4, 4))
    assert torch.equal(hidden.grad, torch.ones(3, 4))


WRONG = {
    "a rate above 1": (lambda: layer_dropout_rates(4, 1.5), "1.5"),
    "a negative rate": (lambda: layer_dropout_rates(4, -0.1), "-0.1"),
    "an unknown kind": (lambda: layer_dropout_rates(4, 0.1, "cubic"), "'cubic'"),
    "too few rates": (lambda: layer_dropout_rates(4, 0.1, [0.1] * 3), "3 dropout rates were given for 4 layers"),
    "a rate above the largest": (lambda: layer_dropout_rates(2, 0.1, [0.0, 0.2]), "layer 1 is 0.2"),
    "rates of a dropout out of range": (lambda: LayerDropout([0.0, 2.0]), "layer 1 is 2.0"),
    "an unknown time scale": (lambda: LayerDropout([0.0], scale="cubic"), "'cubic'"),
    "exit 0": (lambda: early_exit_weights([0, 4], 4), "exit layer 0 is not within 1…4"),
    "an exit past the last": (lambda: AllExits(4, [5]), "exit layer 5"),
    "an exit named twice": (lambda: AllExits(4, [2, 2]), "named twice"),
    "unknown weights": (lambda: early_exit_weights([4], 4, "cubic"), "'cubic'"),
    "a negative scale": (lambda: early_exit_weights([4], 4, "paper", -1), "-1"),
    "weights of zero": (lambda: early_exit_weights([1], 4, "paper"), "have no weight"),
    "more exits a step than candidates": (lambda: RandomExits(8, [2, 3], 3), "exits_per_step is 3"),
    "an interval of 0": (lambda: RotationalCurriculum(8, 0), "got 0"),
    "no step to full depth": (lambda: ShallowSteps(AllExits(8), 1.0), r"shallow_steps must be in \[0, 1\).* got 1.0"),
    "no steps": (lambda: GradualCurriculum(8, 0), "got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_that_nothing_was_drawn_for() -> None:
    dropout = LayerDropout([0.5])
    with pytest.raises(RuntimeError, match="nothing was drawn"):
        dropout.samples(0, 3)
    dropout.draw(0, 4)
    with pytest.raises(RuntimeError, match="meets 3 samples but 4 were drawn for"):
        dropout.samples(0, 3)


def test_a_cache_cannot_lose_samples() -> None:
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="DynamicCache"):
        apply_to_samples(lambda hidden, cache: hidden, torch.tensor([0]), torch.zeros(2, 1), cache=DynamicCache())


def test_the_mean_loss_of_an_exit_is_that_of_its_labels():
    """Of all batches since the last line of the log, which differ in their number."""
    meter, alone = ExitMeter(), SimpleNamespace(device="cpu", reduce=lambda table, reduction: table)
    for losses, labels in (([1.0, 3.0], 10), ([5.0, 2.0], 30)):
        meter.add([2, 4], {"exit_losses": torch.tensor(losses), "num_labels": labels})
    assert meter.drain([2, 4], alone) == {"exit_loss/2": 4.0, "exit_loss/4": 2.25}
    assert meter.drain([2, 4], alone) == {}
