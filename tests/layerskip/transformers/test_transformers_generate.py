"""``custom_generate=layerskip.generate`` against ``model.generate`` alone, option by option."""

import copy
import functools
import gc
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
import transformers
from exits_of import copied_exit
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, VOCABULARY, tiny_model
from tokenizers_of import KINDS
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

import layerskip
from layerskip import Exit, adapt
from layerskip.transformers import compatibility
from layerskip.transformers.custom_generate import decoder_of

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 20
# Largest difference of logits in fp32, which are of order 1.
TOLERANCE = 2e-5
OURS = {"custom_generate": layerskip.generate, "exit_layer": 2, "num_speculations": 4}
PAD = 3


@pytest.fixture(scope="module")
def model():
    """Some of its drafts hold."""
    return tiny_model(upper="weak")


@pytest.fixture(scope="module")
def tokenizer():
    return KINDS["byte_level"]()


def prompts(lengths, seed=0):
    """Prompts, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    for row, length in zip(ids, lengths, strict=True):
        row[width - length :] = torch.randint(4, VOCABULARY, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()}


def from_the_text(model, inputs, source, **options):
    """What ours gives with drafts from another source."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **options, "draft_source": source}
    return model.generate(**inputs, **options, **OURS)


def both(model, inputs, **options):
    """What transformers alone gives, and with ours inside."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **options}
    return model.generate(**inputs, **options), model.generate(**inputs, **options, **OURS)


def some_eos(model, inputs, at):
    """The token that each row of greedy text first has at step ``at``, so that it ends there or before."""
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    return plain[:, inputs["input_ids"].shape[1] + at].unique().tolist()


@pytest.mark.parametrize(
    "source", ["ngram", "auto", layerskip.NgramSource([[5, 6, 7, 8]])], ids=["ngram", "auto", "own"]
)
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}], ids=str)
def test_drafts_from_the_text(model, source, options):
    inputs = prompts([3, 17, 9])
    plain, _ = both(model, inputs, **options)
    assert torch.equal(from_the_text(model, inputs, source, **options), plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("upper", ["random", "weak"])
def test_greedy(architecture, upper):
    model = tiny_model(architecture, upper=upper)
    for length in (1, 17):
        plain, ours = both(model, prompts([length]))
        assert torch.equal(ours, plain)
        assert ours.dtype == torch.int64
        assert not ours.is_inference()


@pytest.mark.parametrize("at", range(6))
def test_eos_at_every_position_of_a_round(model, at):
    inputs = prompts([5])
    plain, ours = both(model, inputs, eos_token_id=some_eos(model, inputs, at))
    assert torch.equal(ours, plain)
    assert plain.shape[1] <= 5 + at + 1


@pytest.mark.parametrize("seed", range(2))
def test_a_left_padded_batch(model, seed):
    inputs = prompts([3, 11, 1, 7], seed)
    plain, ours = both(model, inputs)
    assert torch.equal(ours, plain)
    for at in (2, 9):
        plain, ours = both(model, inputs, eos_token_id=some_eos(model, inputs, at)[:2])
        assert torch.equal(ours, plain)


def test_a_cache_that_is_empty(model):
    inputs, cache = prompts([4, 7]), transformers.DynamicCache(config=model.config)
    plain, _ = both(model, inputs)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "past_key_values": cache}
    assert torch.equal(model.generate(**inputs, **options, **OURS), plain)
    assert torch.equal(layerskip.generate(model, **inputs, **options, exit_layer=2), plain)


def test_what_a_hole_hides_is_in_the_history_and_not_in_the_prompt(model):
    """Padding on the left is in no history that counts; so a hole must not be taken for it."""
    inputs = prompts([9])
    inputs["attention_mask"][0, 4] = 0
    plain, _ = both(model, inputs)
    inputs["input_ids"][0, 4] = plain[0, 9]  # the token that is emitted first, where it is hidden
    assert torch.equal(both(model, inputs)[0][:, 9:], plain[:, 9:])
    penalised, ours = both(model, inputs, repetition_penalty=8.0)
    assert penalised[0, 9] != plain[0, 9]
    assert torch.equal(ours, penalised)


def test_a_mask_with_holes(model):
    inputs = prompts([9, 9])
    inputs["attention_mask"][1, 4:6] = 0
    plain, ours = both(model, inputs)
    assert torch.equal(ours, plain)
    plain, ours = both(model, inputs, repetition_penalty=1.7)
    assert torch.equal(ours, plain)


def only_own_word(batch, ids):
    """Allows each row of a batch some tokens of its own, by its position."""
    return [token for token in range(4, VOCABULARY) if token % 4 in (batch, len(ids) % 4)]


OPTIONS = {
    "penalty": {"repetition_penalty": 1.8},
    "ngram": {"no_repeat_ngram_size": 2},
    "suppress": {"suppress_tokens": list(range(10, 40))},
    "begin": {"begin_suppress_tokens": list(range(4, 98))},
    "bad_words": {"bad_words_ids": [[55], [8, 31], [80]]},
    "bias": {"sequence_bias": {(55,): -9.0, (7, 19): 12.0}},
    "forced_eos": {"forced_eos_token_id": 9},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(4, 70))},
    "decay": {"exponential_decay_length_penalty": (4, 1.9), "eos_token_id": 9},
    "encoder_penalty": {"encoder_repetition_penalty": 1.6},
    "encoder_ngram": {"encoder_no_repeat_ngram_size": 1},
    "prefix": {"prefix_allowed_tokens_fn": only_own_word},
    "normalised": {"renormalize_logits": True, "no_repeat_ngram_size": 1},
    "invalid": {"remove_invalid_values": True},
    "max_length": {"max_new_tokens": None, "max_length": 19},
    "watermark": {"watermarking_config": transformers.WatermarkingConfig(bias=4.0)},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[55]], "min_new_tokens": 3,
                "eos_token_id": [8, 31]},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(model, name):
    inputs = prompts([3, 11, 6], seed=1)
    plain, ours = both(model, inputs, **OPTIONS[name])
    assert torch.equal(ours, plain)
    if name not in ("invalid", "max_length"):
        without = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
        assert plain.shape != without.shape or not torch.equal(plain, without), "the option changed nothing"


class FromHistory(LogitsProcessor):
    """Prefers what the whole history says, padding included; remembers what it was shown."""

    def __init__(self, batch):
        self.seen = [set() for _ in range(batch)]

    def __call__(self, input_ids, scores):
        for row, ids in enumerate(input_ids.tolist()):
            self.seen[row].add(tuple(ids))
        wanted = (input_ids * torch.arange(1, input_ids.shape[1] + 1)).sum(1) % VOCABULARY
        return scores.scatter_add(1, wanted[:, None], torch.full((len(scores), 1), 2.5))


@pytest.mark.parametrize("lengths", [[6], [2, 9, 5]])
def test_processors_see_the_whole_history(model, lengths):
    inputs, plain_one, own = prompts(lengths), FromHistory(len(lengths)), FromHistory(len(lengths))
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    plain = model.generate(**inputs, **options, logits_processor=LogitsProcessorList([plain_one]))
    ours = model.generate(**inputs, **options, logits_processor=LogitsProcessorList([own]), **OURS)
    assert torch.equal(ours, plain)
    width = inputs["input_ids"].shape[1]
    for row, ids in enumerate(ours.tolist()):
        for length in range(width, width + NEW):
            assert tuple(ids[:length]) in own.seen[row]


class ByRow(LogitsProcessor):
    """Treats each row of the batch in a way of its own."""

    def __init__(self, batch):
        self.bias = torch.randn(batch, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 3

    def __call__(self, input_ids, scores):
        return scores + self.bias


def test_processors_know_which_row_it_is(model):
    inputs = prompts([2, 9, 5])
    plain, ours = both(model, inputs, logits_processor=LogitsProcessorList([ByRow(3)]))
    assert torch.equal(ours, plain)


def test_a_processor_that_writes_in_place(model):
    class InPlace(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, ::3] = -torch.inf
            input_ids.zero_()
            return scores

    inputs = prompts([2, 9])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    ours = model.generate(**inputs, **options, logits_processor=LogitsProcessorList([InPlace()]), **OURS)
    assert bool((ours[:, 9:] % 3 != 0).all())


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_call(model, data):
    """Prompts, ends, exits and drafts of all sizes."""
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    inputs = prompts(lengths, data.draw(st.integers(0, 99)))
    options = {
        "max_new_tokens": data.draw(st.integers(1, 12)),
        "eos_token_id": data.draw(st.none() | st.lists(st.integers(4, VOCABULARY - 1), min_size=1, max_size=30)),
        "repetition_penalty": data.draw(st.sampled_from([None, 1.5])),
        "min_new_tokens": data.draw(st.sampled_from([None, 1, 4])),
        "do_sample": False,
        "pad_token_id": PAD,
    }
    own = {"exit_layer": data.draw(st.integers(1, 3)), "num_speculations": data.draw(st.integers(1, 7))}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=layerskip.generate, **own), plain)


# Ends


class After(StoppingCriteria):
    """Row b ends ``b + 2`` tokens after the prompt; counts how often it was asked."""

    def __init__(self, prompt):
        self.prompt, self.asked = prompt, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.asked += 1
        return input_ids.shape[1] >= self.prompt + 2 + torch.arange(len(input_ids))


@pytest.mark.parametrize("eos", [None, 9])
@pytest.mark.parametrize("lengths", [[5], [2, 9, 5, 1]])
def test_criteria_end_rows_by_themselves_where_there_is_an_eos(model, lengths, eos):
    """Without one a row that has ended continues until all have."""
    inputs = prompts(lengths)
    criterion = After(max(lengths))
    plain, ours = both(model, inputs, stopping_criteria=StoppingCriteriaList([criterion]), eos_token_id=eos)
    assert torch.equal(ours, plain)
    assert ours.shape[1] == max(lengths) + len(lengths) + 1
    assert criterion.asked > len(lengths)


class Sure(StoppingCriteria):
    """Ends a row with a token that was at least so probable."""

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, input_ids, scores, **kwargs):
        return scores[-1].softmax(-1).amax(-1) >= self.probability


@pytest.mark.parametrize("lengths", [[5], [2, 9, 5]])
def test_criteria_on_scores(model, lengths):
    inputs, options = prompts(lengths), {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": 9}
    scores = torch.stack(both(model, inputs, **options)[0].scores[:10])  # [10, B, V]
    often = float(scores.softmax(-1).amax(-1).amax(0).min()) - 1e-4
    plain, ours = both(model, inputs, stopping_criteria=StoppingCriteriaList([Sure(often)]), **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert plain.sequences.shape[1] <= max(lengths) + 10


def test_criteria_of_the_callers_own_making(model):
    inputs = prompts([5])
    eos = some_eos(model, inputs, 7)
    for criterion in (MaxLengthCriteria(12), EosTokenCriteria(eos)):
        plain, ours = both(model, inputs, stopping_criteria=StoppingCriteriaList([criterion]))
        assert torch.equal(ours, plain)
        assert plain.shape[1] < 5 + NEW


def test_no_time_is_left(model):
    plain, ours = both(model, prompts([5]), max_time=0.0)
    assert torch.equal(ours, plain)
    assert ours.shape[1] == 6


@pytest.mark.parametrize("lengths", [[5], [2, 9, 5]])
@pytest.mark.parametrize("eos", [None, 1])
def test_stop_strings(model, tokenizer, lengths, eos):
    inputs = prompts(lengths)
    texts = tokenizer.batch_decode(both(model, inputs)[0][:, max(lengths) :])
    for start in (0, 3, 10):
        stops = [text[start : start + 2] for text in texts]
        plain, ours = both(model, inputs, stop_strings=stops, tokenizer=tokenizer, eos_token_id=eos)
        assert torch.equal(ours, plain), stops
        criterion = StoppingCriteriaList([StopStringCriteria(tokenizer, stops)])
        assert torch.equal(both(model, inputs, stopping_criteria=criterion, eos_token_id=eos)[1], plain)


# Streamers


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("eos_at", [None, 4, 9])
@pytest.mark.parametrize("lengths", [[5], [2, 9, 5]])
def test_a_streamer_gets_what_transformers_gives_it(model, lengths, eos_at):
    inputs, records = prompts(lengths), []
    eos = None if eos_at is None else some_eos(model, inputs, eos_at)[:1]
    for own in ({}, OURS):
        records.append(Recorder())
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "eos_token_id": eos}
        model.generate(**inputs, **options, streamer=records[-1], **own)
    assert records[1].puts == records[0].puts
    assert records[1].ended


def test_a_batch_without_eos_streams_no_more_than_it_returns(model):
    inputs, record = prompts([2, 9, 5]), Recorder()
    options = {"max_new_tokens": NEW, "do_sample": False, "stopping_criteria": StoppingCriteriaList([After(9)])}
    out = model.generate(**inputs, **options, streamer=record, **OURS)
    assert torch.tensor(record.puts[1:]).T.tolist() == out[:, 9:].tolist()


def test_text_streams(model, tokenizer):
    inputs = prompts([5])
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = tokenizer.decode(model.generate(**inputs, **options)[0, 5:], skip_special_tokens=True)
    for kind in (layerskip.TextStream, functools.partial(transformers.TextIteratorStreamer, skip_prompt=True,
                                                         skip_special_tokens=True)):  # fmt: skip
        streamer = kind(tokenizer, timeout=60)
        arguments = {**inputs, **options, **OURS, "streamer": streamer}
        thread = Thread(target=model.generate, kwargs=arguments)
        thread.start()
        assert "".join(streamer) == expected
        thread.join()


# What is returned


@pytest.mark.parametrize("lengths", [[5], [2, 9, 5]])
def test_scores_and_logits(model, lengths):
    inputs = prompts(lengths)
    eos = some_eos(model, inputs, 8)[:1]
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "eos_token_id": eos}
    plain, ours = both(model, inputs, repetition_penalty=1.4, **options)
    assert type(ours) is type(plain) is transformers.generation.GenerateDecoderOnlyOutput
    assert torch.equal(ours.sequences, plain.sequences)
    assert len(ours.scores) == len(ours.logits) == len(plain.scores)
    running = torch.ones(len(lengths), dtype=torch.bool)
    for step in range(len(plain.scores)):
        for name in ("scores", "logits"):
            one, other = getattr(ours, name)[step], getattr(plain, name)[step]
            torch.testing.assert_close(one[running], other[running], atol=TOLERANCE, rtol=0)
            if not running.all():
                assert one[~running].softmax(-1)[:, PAD].tolist() == [1.0] * int((~running).sum())
        running &= plain.sequences[:, max(lengths) + step] != eos[0]
    probability = model.compute_transition_scores(ours.sequences, ours.scores, normalize_logits=True)
    expected = model.compute_transition_scores(plain.sequences, plain.scores, normalize_logits=True)
    assert probability.shape == expected.shape
    assert not ours.scores[0].is_inference()


@pytest.mark.parametrize(("scores", "logits"), [(False, False), (True, False), (False, True)])
def test_a_dict_holds_what_was_asked_for(model, scores, logits):
    options = {"return_dict_in_generate": True, "output_scores": scores, "output_logits": logits}
    plain, ours = both(model, prompts([5]), **options)
    assert list(ours) == [name for name in plain if name not in ("cache", "past_key_values")]
    assert torch.equal(ours["sequences"], plain["sequences"])


def test_the_config_of_the_model_counts(model):
    changed = tiny_model(upper="weak")
    changed.generation_config.repetition_penalty = 1.8
    changed.generation_config.max_new_tokens = 7
    inputs = prompts([5])
    expected = model.generate(**inputs, max_new_tokens=7, do_sample=False, repetition_penalty=1.8)
    assert torch.equal(changed.generate(**inputs, **OURS), expected)
    own = transformers.GenerationConfig(max_new_tokens=7, repetition_penalty=1.8, do_sample=False)
    assert torch.equal(model.generate(**inputs, generation_config=own, **OURS), expected)


SAMPLING = {"do_sample": True, "output_scores": True, "return_dict_in_generate": True}
# A value for every option of transformers' generation config, and whether it is refused. Other options are added to it.
FIELDS = {
    "max_length": ({"max_length": 19, "max_new_tokens": None}, False),
    "max_new_tokens": ({"max_new_tokens": 7}, False),
    "min_length": ({"min_length": 14, "eos_token_id": list(range(4, 70))}, False),
    "min_new_tokens": ({"min_new_tokens": 9, "eos_token_id": list(range(4, 70))}, False),
    "max_time": ({"max_time": -1.0}, False),
    "stop_strings": ({"stop_strings": [chr(letter) for letter in range(33, 127)]}, False),
    "do_sample": (SAMPLING, False),
    "temperature": ({"temperature": 0.6, **SAMPLING}, False),
    "top_k": ({"top_k": 7, **SAMPLING}, False),
    "top_p": ({"top_p": 0.4, **SAMPLING}, False),
    "min_p": ({"min_p": 0.3, **SAMPLING}, False),
    "top_h": ({"top_h": 0.3, **SAMPLING}, False),
    "typical_p": ({"typical_p": 0.3, **SAMPLING}, False),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.02, **SAMPLING}, False),
    "eta_cutoff": ({"eta_cutoff": 0.3, **SAMPLING}, False),
    "pad_token_id": ({"pad_token_id": 11, "eos_token_id": list(range(4, 40))}, False),
    "bos_token_id": ({"bos_token_id": 5}, False),
    "eos_token_id": ({"eos_token_id": list(range(4, 40))}, False),
    "num_return_sequences": ({"num_return_sequences": 2, **SAMPLING}, False),
    "return_dict_in_generate": ({"return_dict_in_generate": True}, False),
    "output_scores": ({"output_scores": True, "return_dict_in_generate": True}, False),
    "output_logits": ({"output_logits": True, "return_dict_in_generate": True}, False),
    "repetition_penalty": (OPTIONS["penalty"], False),
    "encoder_repetition_penalty": (OPTIONS["encoder_penalty"], False),
    "no_repeat_ngram_size": (OPTIONS["ngram"], False),
    "encoder_no_repeat_ngram_size": (OPTIONS["encoder_ngram"], False),
    "bad_words_ids": (OPTIONS["bad_words"], False),
    "renormalize_logits": (OPTIONS["normalised"], False),
    "forced_bos_token_id": ({"forced_bos_token_id": 8}, False),
    "forced_eos_token_id": (OPTIONS["forced_eos"], False),
    "remove_invalid_values": (OPTIONS["invalid"], False),
    "exponential_decay_length_penalty": (OPTIONS["decay"], False),
    "suppress_tokens": (OPTIONS["suppress"], False),
    "begin_suppress_tokens": (OPTIONS["begin"], False),
    "sequence_bias": (OPTIONS["bias"], False),
    "watermarking_config": (OPTIONS["watermark"], False),
    "token_healing": ({"token_healing": True}, False),
    "num_beams": ({"num_beams": 3}, True),
    "num_beam_groups": ({"num_beam_groups": 3, "num_beams": 3, "diversity_penalty": 0.5}, True),
    "constraints": ({"constraints": ["a"]}, True),
    "force_words_ids": ({"force_words_ids": [[5]]}, True),
    "use_mtp": ({"use_mtp": True}, True),
    "cache_implementation": ({"cache_implementation": "offloaded"}, True),
    "guidance_scale": ({"guidance_scale": 1.5}, True),
    "output_attentions": ({"output_attentions": True, "return_dict_in_generate": True}, True),
    "output_hidden_states": ({"output_hidden_states": True, "return_dict_in_generate": True}, True),
    "is_assistant": ({"is_assistant": True}, True),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, True),
    "assistant_early_exit": ({"assistant_early_exit": 2}, True),
    "speculation_type": ({"speculation_type": "dflash"}, True),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, True),
    "dola_layers": ({"dola_layers": "low"}, True),
    "use_cache": ({"use_cache": False}, False),
    "cache_config": ({"cache_config": {"nbits": 4}}, False),
    "max_cache_len": ({"max_cache_len": 90}, False),
    "prefill_chunk_size": ({"prefill_chunk_size": 2}, False),
    "compile_config": ({"compile_config": transformers.CompileConfig()}, False),
    "disable_compile": ({"disable_compile": True}, False),
    "low_memory": ({"low_memory": True}, False),
    "continuous_batching_config": ({}, False),  # transformers refuses it in a generation config
    "early_stopping": ({"early_stopping": True}, False),
    "length_penalty": ({"length_penalty": 2.0}, False),
    "diversity_penalty": ({"diversity_penalty": 0.5}, False),
    "decoder_start_token_id": ({"decoder_start_token_id": 5}, False),
    "num_assistant_tokens": ({"num_assistant_tokens": 3}, False),
    "num_assistant_tokens_schedule": ({"num_assistant_tokens_schedule": "heuristic"}, False),
    "assistant_confidence_threshold": ({"assistant_confidence_threshold": 0.9}, False),
    "assistant_lookbehind": ({"assistant_lookbehind": 3}, False),
    "target_lookbehind": ({"target_lookbehind": 3}, False),
    "assistant_ensemble_weight": ({"assistant_ensemble_weight": 0.5}, False),
    "max_matching_ngram_size": ({"max_matching_ngram_size": 3}, False),
    "return_legacy_cache": ({"return_legacy_cache": True}, False),
    "transformers_version": ({"transformers_version": "4.57.0"}, False),
}  # fmt: skip


def to_be_healed(tokenizer):
    """A model of the tokenizer's whole vocabulary, and a prompt whose last token has a continuation."""
    model, own = tiny_model(upper="weak"), copy.deepcopy(tokenizer)
    model.resize_token_embeddings(len(own), mean_resizing=False)
    own.pad_token, own.bos_token, own.padding_side = "<|end|>", "<|start|>", "left"
    inputs = {**own("the dog sa", return_tensors="pt"), "tokenizer": own}
    inputs.pop("token_type_ids", None)
    healed = model.heal_tokens(inputs["input_ids"], own)
    assert not torch.equal(healed, inputs["input_ids"])
    return model, inputs


def fields_of_transformers():
    return [name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", fields_of_transformers())
def test_every_field_of_a_generation_config_is_obeyed_or_refused(model, tokenizer, name):
    """A field that a newer transformers adds has no value here, so that it fails."""
    options, refused = FIELDS[name]
    inputs = prompts([3, 9], seed=1)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **options}
    if name == "stop_strings":
        inputs["tokenizer"] = tokenizer
    if name == "token_healing":
        model, inputs = to_be_healed(tokenizer)
    config = transformers.GenerationConfig(**options)
    if refused:
        with pytest.raises(ValueError, match=re.escape(f"{name}={options[name]!r}") + ".*honoured"):
            model.generate(**inputs, generation_config=config, **OURS)
        return
    plain = model.generate(**inputs, generation_config=config)
    ours = model.generate(**inputs, generation_config=config, **OURS)
    if not isinstance(plain, torch.Tensor):
        assert ours.keys() == plain.keys() - {"past_key_values", "cache"}
        for kept in ("scores", "logits"):  # of the first token: later ones depend on what was drawn
            assert (kept in plain) == (kept in ours)
            if kept in plain:
                assert torch.allclose(ours[kept][0], plain[kept][0], atol=TOLERANCE)
        plain, ours = plain.sequences, ours.sequences
    assert ours.shape[0] == plain.shape[0]
    assert config.do_sample or torch.equal(ours, plain)


def test_a_field_that_is_not_known_yet_is_refused(model, monkeypatch):
    known = compatibility.KNOWN
    monkeypatch.setattr(compatibility, "KNOWN", known - {"max_cache_len", "length_penalty"})
    compatibility.unknown.cache_clear()
    try:
        model.generate(**prompts([4]), max_new_tokens=2, pad_token_id=PAD, **OURS)
        with pytest.raises(ValueError, match=r"max_cache_len=90 can't be honoured.*know"):
            model.generate(**prompts([4]), max_new_tokens=2, max_cache_len=90, pad_token_id=PAD, **OURS)
    finally:
        monkeypatch.undo()
        compatibility.unknown.cache_clear()


# Ways to call it


def test_a_direct_call(model, tokenizer):
    inputs, record = prompts([2, 9]), Recorder()
    stops = {"stop_strings": ["QQ"], "tokenizer": tokenizer}
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "streamer": record, **stops}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert torch.equal(layerskip.generate(model, ids, attention_mask=mask, exit_layer=1, **options), expected)
    assert len(record.puts) == NEW + 1


def test_a_partial_gets_the_streamer(model):
    record = Recorder()
    ours = functools.partial(layerskip.generate, exit_layer=2, num_speculations=3)
    model.generate(**prompts([4]), max_new_tokens=5, do_sample=False, streamer=record, custom_generate=ours)
    assert len(record.puts) == 6


def test_other_callables_are_called_as_before(model):
    """What transformers leaves out is none of ours; if this fails, `patch_generation_mixin` has become superfluous."""
    given = {}

    def other(model, input_ids, **arguments):
        given.update(arguments)
        return input_ids

    model.generate(**prompts([4]), custom_generate=other, streamer=Recorder(), max_new_tokens=5)
    assert "streamer" not in given


def test_auto(model):
    inputs = prompts([5, 3])
    plain, _ = both(model, inputs)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    exit_ = copied_exit(adapt(model), 2)
    for changes in (
        {},
        {"draft_head": "int8"},
        {"draft_threshold": 0.3, "exit_layer": 1, "num_speculations": 6},
        {"exit": exit_},
        {"exit": exit_, "exit_layer": 2, "draft_head": "int8", "num_speculations": 3},
    ):
        ours = model.generate(**inputs, **options, custom_generate=layerskip.generate, **changes)
        assert torch.equal(ours, plain)


def test_an_accelerated_model(model):
    inputs = prompts([5, 3])
    plain, _ = both(model, inputs)
    fast = layerskip.accelerate(tiny_model(upper="weak"))
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(fast.generate(**inputs, **options, **OURS), plain)


def test_a_pipeline(model, tokenizer):
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = "QED.SO"
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert max(tokenizer(text).input_ids) < VOCABULARY
    plain = pipe(text, **options)
    assert pipe(text, **options, **OURS) == plain
    stop = plain[0]["generated_text"][len(text) + 4 :][:2]
    shorter = pipe(text, stop_sequence=stop, **options)
    assert shorter != plain
    assert pipe(text, stop_sequence=stop, **options, **OURS) == shorter


def test_a_chat(model, tokenizer):
    tokenizer.chat_template = "{% for message in messages %}Q:{{ message['content'] }};A:{% endfor %}"
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "WHY"}]
    options = {"max_new_tokens": NEW, "do_sample": False}
    plain = pipe(chat, **options)
    assert plain[0]["generated_text"][-1]["role"] == "assistant"
    assert pipe(chat, **options, **OURS) == plain
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert inputs["input_ids"].max() < VOCABULARY
    assert torch.equal(model.generate(**inputs, **options, **OURS), model.generate(**inputs, **options))


# The decoder that is kept


def test_a_model_keeps_its_decoder_and_lets_it_go():
    model = tiny_model(upper="weak")
    decoder = decoder_of(model, "full")
    assert decoder_of(model, "full") is decoder
    quantised = decoder_of(model, "int8")
    assert quantised is not decoder
    assert decoder_of(model, "int8") is quantised
    head = quantised.draft_head
    quantised.generate(prompts([5])["input_ids"], 2)
    assert quantised.draft_head is head
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    quantised.generate(prompts([5])["input_ids"], 2)
    assert quantised.draft_head is not head
    exit_ = copied_exit(adapt(model), 2)
    with_exit = decoder_of(model, None, exit_)
    assert with_exit.exit_layer == 2
    assert decoder_of(model, None, exit_) is with_exit is not decoder_of(model, None)
    reference = weakref.ref(model)
    del model, exit_, with_exit
    gc.collect()
    assert reference() is None


def test_calls_within_calls_and_in_threads(model):
    """Each has a cache of its own."""
    inputs, nested = prompts([5]), []
    plain, _ = both(model, inputs)

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            nested.append(model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **OURS))
            return scores

    options = {**inputs, **OURS, "max_new_tokens": NEW, "do_sample": False}
    outer = model.generate(**options, logits_processor=LogitsProcessorList([Asks()]))
    assert all(torch.equal(out, plain) for out in [outer, *nested])
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(model.generate, **options) for _ in range(6)]
    assert all(torch.equal(run.result(), plain) for run in runs)


def test_new_weights_are_followed(model):
    changing, inputs = tiny_model(upper="weak"), prompts([5])
    both(changing, inputs)
    with torch.no_grad():
        for parameter in changing.parameters():
            parameter.mul_(0.9)
    plain, ours = both(changing, inputs)
    assert torch.equal(ours, plain)
    changing.load_state_dict(tiny_model(seed=7).state_dict(), assign=True)
    plain, ours = both(changing, inputs)
    assert torch.equal(ours, plain)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams=3 can't be honoured"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"dola_layers": "low"}, "dola_layers='low'"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"exit_layer": 4}, r"exit_layer must be .*1 … 3.*4"),
        ({"num_speculations": 0}, "num_speculations"),
        ({"draft_head": "int4"}, "draft_head.*'int4'"),
        ({"exit": Exit(2, torch.ones(32), 9, VOCABULARY)}, "the exit is for a model of 9 layers, this one has 4"),
        ({"exit": Exit(2, torch.ones(32), 4, VOCABULARY), "exit_layer": 3}, "exit_layer is 3, but the exit .* after 2"),
        ({"draft_threshold": 2.0}, "draft_threshold.*2.0"),
        ({"max_new_tokens": 1000}, "max_new_tokens=1000 .*max_seq_len=256"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "padded on the left"),
        ({"position_ids": torch.tensor([[2, 3, 4, 5]])}, "position_ids"),
    ],
)
def test_what_cannot_be_honoured_is_named(model, options, message):
    inputs = prompts([4])
    with pytest.raises(ValueError, match=message):
        model.generate(**{**inputs, "max_new_tokens": 4, **OURS, **options})


def test_other_things_that_cannot_be_honoured(model):
    inputs = prompts([4])
    with pytest.raises(ValueError, match="assistant_model"):
        model.generate(**inputs, max_new_tokens=4, assistant_model=tiny_model(), **OURS)
    cache = model(inputs["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"honoured: layerskip\.generate has a cache"):
        model.generate(**inputs, max_new_tokens=4, past_key_values=cache, **OURS)
    embeds = model.model.embed_tokens(inputs["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, max_new_tokens=4, **OURS)
    with pytest.raises(TypeError, match="with generate, got LayerSkipModel"):
        layerskip.generate(layerskip.adapt(model), inputs["input_ids"])
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=101))
    with pytest.raises(layerskip.UnsupportedModelError, match="GPT2LMHeadModel"):
        other.generate(**inputs, max_new_tokens=4, **OURS)


def test_an_error_of_a_processor_reaches_the_caller(model):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(**prompts([4]), max_new_tokens=4, logits_processor=LogitsProcessorList([Broken()]), **OURS)
