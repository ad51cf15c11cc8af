"""Defaults: everything is chosen by measured speed; what a caller fixes stays fixed."""

from __future__ import annotations

import warnings

import helpers
import pytest
import torch
from exits_of import copied_exit, random_exit
from tiny import prompt_of, tiny_model

import layerskip
from layerskip import SamplingParams, SelfSpeculativeDecoder
from layerskip.decoding.outputs import RoundRecord, Stats
from layerskip.decoding.request import RequestDefaults
from layerskip.models import adapt
from layerskip.models.exit import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("auto", "auto", "auto")),
        ({"exit_layer": "auto", "num_speculations": "auto"}, ("auto", "auto", "auto")),
        ({"exit_layer": 2}, (2, 4, "exit")),
        ({"num_speculations": 6}, ("auto", 6, "exit")),
        ({"exit_layer": 2, "num_speculations": "auto"}, (2, "auto", "exit")),
        ({"exit_layer": 2, "draft_source": "auto"}, (2, 4, "auto")),
        ({"draft_source": "ngram"}, ("auto", "auto", "ngram")),
    ],
    ids=str,
)
def test_what_is_not_given(given, expected):
    options = RequestDefaults(**given).complete()
    assert (options.exit_layer, options.num_speculations, options.draft_source) == expected
    decoder = SelfSpeculativeDecoder(tiny_model(), **given)
    assert (decoder.exit_layer, decoder.num_speculations, decoder.draft_source) == expected
    requested = SelfSpeculativeDecoder(tiny_model()).defaults.updated(decoder.model, 12, **given)
    assert (requested.exit_layer, requested.num_speculations, requested.draft_source) == expected


def test_no_layer_is_no_default():
    decoder = SelfSpeculativeDecoder(tiny_model())
    with pytest.raises(ValueError, match=r"exit_layer must be in 1 … 3 .* got 0"):
        decoder.generate(prompt_of(5), 4, exit_layer=0)


def test_a_request_keeps_what_the_decoder_fixes():
    decoder = SelfSpeculativeDecoder(tiny_model(), num_speculations="auto", draft_source="ngram")
    options = decoder.defaults.updated(decoder.model, 12, exit_layer=2)
    assert (options.exit_layer, options.num_speculations, options.draft_source) == (2, "auto", "ngram")


def test_without_options_tokens_are_those_of_autoregressive_decoding():
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"))
    prompts = [prompt_of(5), prompt_of(9), prompt_of(3)]
    out = decoder.generate(prompts, 40, eos_token_id=[])
    plain = decoder.generate(prompts, 40, strategy="autoregressive", eos_token_id=[])
    assert torch.equal(out.sequences, plain.sequences)
    assert out.stats.accepted > 0


def test_a_seed_repeats_a_text_without_options():
    """ "auto" depends on clocks, so a sampled request with a seed drafts only if E, K or the source is given."""
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"))
    drawn = SamplingParams(temperature=1.0, seed=7)
    first, again = (decoder.generate(prompt_of(5), 60, sampling=drawn, eos_token_id=[]) for _ in range(2))
    assert torch.equal(first.sequences, again.sequences)
    assert first.stats.drafted == 0
    drafted = decoder.generate(prompt_of(5), 60, sampling=drawn, exit_layer=1, eos_token_id=[])
    assert drafted.stats.drafted > 0
    assert decoder.generate(prompt_of(5), 60, sampling=SamplingParams(1.0), eos_token_id=[]).stats.drafted > 0


def test_a_trained_exit_drafts_at_its_layer_and_as_many_as_pay():
    model = tiny_model(upper="silent")
    decoder = SelfSpeculativeDecoder(model, exit=copied_exit(adapt(model), 2, 1))
    assert (decoder.exit_layer, decoder.num_speculations, decoder.draft_source) == (2, "auto", "auto")
    out = decoder.generate(prompt_of(5), 8, strategy="early_exit", eos_token_id=[])
    assert out.stats.new_tokens == 8


class TestHint:
    def test_an_exit_whose_drafts_are_rejected(self):
        model = tiny_model()
        decoder = SelfSpeculativeDecoder(model, exit_layer=1, num_speculations=4)
        with pytest.warns(UserWarning, match="of exit layer 1 were accepted, so decoding is slower"):
            decoder.generate(prompt_of(5), 60, eos_token_id=[])

    @pytest.mark.parametrize(
        ("options", "warns"),
        [
            ({"exit_layer": 1}, True),
            ({"exit_layer": 1, "num_speculations": "auto"}, False),
            ({"exit_layer": 1, "draft_source": "auto"}, False),
            ({"draft_source": "ngram", "num_speculations": 4}, False),
            ({}, False),
        ],
        ids=str,
    )
    def test_only_a_fixed_exit_gets_it(self, options, warns):
        decoder = SelfSpeculativeDecoder(tiny_model(), **options)
        requested = decoder.defaults.updated(decoder.model, 12)
        rejected = RoundRecord("exit", 1, (1, 2, 3, 4), 0, 1)
        stats = Stats(5, 21, (rejected,) * 20, 1.0, 0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            requested.hint(stats)
        assert bool(caught) == warns

    def test_an_exit_that_drafts_well_needs_none(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SelfSpeculativeDecoder(tiny_model(upper="silent"), 1, 4).generate(prompt_of(5), 100, eos_token_id=[])


class TestFingerprint:
    def test_it_is_that_of_the_weights(self):
        model = tiny_model()
        first = fingerprint(adapt(model))
        assert first == fingerprint(adapt(tiny_model()))
        assert first != fingerprint(adapt(tiny_model(upper="weak")))
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[0, 3] += 1
        assert first != fingerprint(adapt(model))
        model = tiny_model()
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[-1, -1] += 1
        assert first != fingerprint(adapt(model))

    def test_a_dtype_does_not_change_it(self):
        stored = tiny_model().bfloat16()
        assert fingerprint(adapt(stored)) == fingerprint(adapt(stored.float()))

    def test_packed_weights_have_none(self):
        model = helpers.tiny_model("llama2", intermediate_size=64)
        assert fingerprint(adapt(model).quantize("int8")) is None

    def test_an_exit_keeps_it(self, tmp_path):
        trained = random_exit(adapt(tiny_model()))
        assert layerskip.Exit.load(trained.save(tmp_path)).model_fingerprint is None
        trained.model_fingerprint = "12ab"
        assert layerskip.Exit.load(trained.save(tmp_path)).model_fingerprint == "12ab"
