"""Bad input and bad weights get an exception that names them, and nothing is emitted."""

from __future__ import annotations

import pytest
import torch
from test_decoding import Recorder
from tiny import LAYERS, ROUND, VOCABULARY, generous, prompt_of, requires_native, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

import layerskip_kernels
from layerskip import Conversation, SamplingParams, SelfSpeculativeDecoder, UnsupportedModelError, accelerate
from layerskip.decoding.adaptive import AcceptanceRates
from layerskip.decoding.request import Request, RequestDefaults
from layerskip.models import adapt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exit_layer": 0}, ValueError, r"exit_layer must be in 1 … 3 for a model of 4 layers, got 0"),
        ({"exit_layer": LAYERS}, ValueError, "exit_layer must be in 1 … 3 .* got 4"),
        ({"exit_layer": -1}, ValueError, "got -1"),
        ({"exit_layer": 1.5}, TypeError, "exit_layer must be an int, got 1.5"),
        ({"exit_layer": True}, TypeError, "exit_layer must be an int, got True"),
        ({"exit_layer": 1, "num_speculations": 0}, ValueError, "num_speculations must be at least 1, got 0"),
        ({"exit_layer": 1, "num_speculations": "4"}, TypeError, "num_speculations must be an int, got '4'"),
        ({"exit_layer": 1, "max_seq_len": 0}, ValueError, "max_seq_len must be at least 1, got 0"),
        ({"exit_layer": 1, "max_seq_len": 257}, ValueError, "max_seq_len 257 exceeds the 256 positions"),
        ({"exit_layer": "auto", "exit_choices": []}, ValueError, "exit_choices must hold at least one layer"),
        ({"exit_layer": "auto", "exit_choices": [1, 4]}, ValueError, "exit_layer must be in 1 … 3 .* got 4"),
        ({"exit_layer": 1, "draft_head": "int4"}, ValueError, "draft_head must be .* got 'int4'"),
        ({"exit_layer": 1, "draft_threshold": 1.5}, ValueError, r"draft_threshold must be in \[0, 1\], got 1.5"),
    ],
)
def test_invalid_decoder_arguments(model, options, error, message):
    with pytest.raises(error, match=message):
        SelfSpeculativeDecoder(model, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_ids": "w1 w2"}, ValueError, "a prompt that is a string needs a tokenizer: set decoder.tokenizer, or"),
        ({"input_ids": ["w1 w2", [3]]}, ValueError, "a prompt that is a string needs a tokenizer"),
        ({"input_ids": [[3], "w1"], "tokenizer": len}, TypeError, r"all strings or all token ids, .* and \[3\]"),
        ({"input_ids": 7}, TypeError, "a prompt must be a str, a tensor, .*, got int"),
        ({"input_ids": [[1], 2]}, TypeError, "a list of input_ids holds prompts, .* got 2"),
        ({"input_ids": [[1, 2.5]]}, TypeError, "a token of the prompt must be an int, got 2.5"),
        ({"input_ids": []}, ValueError, "the prompt is empty"),
        ({"input_ids": [torch.ones(2, 3, dtype=torch.int64)]}, ValueError, r"a prompt has shape \[2, 3\], expected"),
        ({"input_ids": torch.ones(1, 3)}, TypeError, "dtype float32, expected int64"),
        ({"input_ids": torch.ones(1, 1, 3, dtype=torch.int64)}, ValueError, r"shape \[1, 1, 3\], expected \[N\] or"),
        ({"attention_mask": [[1, 0, 1, 1]]}, ValueError, "attention_mask has a hole at position 1 of prompt 0"),
        ({"attention_mask": [[0, 1, 0, 1]]}, ValueError, "attention_mask has a hole at position 2 of prompt 0"),
        ({"attention_mask": [[0, 0, 0, 0]]}, ValueError, "attention_mask hides all of prompt 0"),
        ({"attention_mask": [[1, 1, 1]]}, ValueError, r"attention_mask has shape \[3\] for prompt 0, of 4 tokens"),
        ({"attention_mask": [[1] * 4] * 2}, ValueError, "attention_mask has 2 rows for 1 prompts"),
        ({"input_ids": "w1", "attention_mask": [[1]]}, ValueError, "attention_mask goes with token ids"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64)},
            ValueError,
            "a streamer takes one prompt, got a batch of 2",
        ),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, ValueError, "prompt is empty"),
        (
            {"input_ids": torch.tensor([[3, VOCABULARY]])},
            ValueError,
            f"token id {VOCABULARY} is outside the vocabulary",
        ),
        ({"input_ids": torch.tensor([[3, -2]])}, ValueError, "token id -2 is outside the vocabulary"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64, device="meta")}, ValueError, "is on meta, the model on cpu"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 253}, ValueError, "a prompt of 4 tokens and max_new_tokens=253 make 257, .*=256"),
        ({"strategy": "beam"}, ValueError, "unknown strategy 'beam', expected one of self_speculative"),
        ({"exit_layer": LAYERS}, ValueError, "exit_layer must be in"),
        ({"num_speculations": 0}, ValueError, "num_speculations must be at least 1"),
        ({"eos_token_id": VOCABULARY}, ValueError, f"eos_token_id {VOCABULARY} is outside the vocabulary"),
        ({"eos_token_id": [1, -1]}, ValueError, "eos_token_id -1 is outside the vocabulary"),
        ({"eos_token_id": [1.0]}, TypeError, "eos_token_id must be an int, got 1.0"),
        ({"exit_layer": "best"}, TypeError, "exit_layer must be an int, got 'best'"),
        ({"num_speculations": "auto!"}, TypeError, "num_speculations must be an int, got 'auto!'"),
        ({"draft_threshold": 1.5}, ValueError, r"draft_threshold must be in \[0, 1\], got 1.5"),
        ({"draft_threshold": float("nan")}, ValueError, r"draft_threshold must be in \[0, 1\], got nan"),
        ({"draft_threshold": "high"}, TypeError, "draft_threshold must be a number, got 'high'"),
        ({"sampling": 0.7}, TypeError, "sampling must be a SamplingParams, got float"),
        ({"sampling": [SamplingParams()] * 2}, ValueError, "sampling has 2 entries for 1 prompts"),
        ({"logits_processor": [None] * 3}, ValueError, "logits_processor has 3 entries for 1 prompts"),
        ({"should_stop": []}, ValueError, "should_stop has 0 entries for 1 prompts"),
        (
            {"sampling": SamplingParams(logit_bias={VOCABULARY: 1.0})},
            ValueError,
            "logit_bias has token id 101, outside",
        ),
        ({"pad_token_id": VOCABULARY}, ValueError, "pad_token_id must be in 0 … 100, got 101"),
    ],
)
def test_invalid_call_arguments(model, options, error, message):
    recorder = Recorder()
    call = {"input_ids": prompt_of(4), "max_new_tokens": 4, "streamer": recorder} | options
    with pytest.raises(error, match=message):
        SelfSpeculativeDecoder(model, 1).generate(**call)
    assert recorder.groups == []


@pytest.mark.parametrize("given", [{}, None, "smollm2", tiny_model])
@pytest.mark.parametrize("take", [SelfSpeculativeDecoder, adapt, accelerate], ids=lambda one: one.__name__)
def test_what_is_no_model(take, given):
    kind = type(given).__name__
    message = f"model must be a transformers.PreTrainedModel or a LayerSkipModel, got {kind}; .*from_pretrained take"
    with pytest.raises(TypeError, match=message):
        take(given)


def test_an_unsupported_model_is_told_shortly():
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2)
    with pytest.raises(
        UnsupportedModelError, match=r"GPT2LMHeadModel of model_type 'gpt2' .*supported: llama"
    ) as error:
        SelfSpeculativeDecoder(GPT2LMHeadModel(config))
    text = str(error.value)
    assert len(text) < 250
    assert text.count("llama") == 1
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel of model_type 'llama' .*supported: LlamaForCausalLM$"):
        SelfSpeculativeDecoder(tiny_model().model)


def test_the_limit_of_a_session_is_told(model):
    decoder = SelfSpeculativeDecoder(model, 1, 4)
    whose = "num_speculations must be in 1 … 4, got 8; the session was opened with this limit, num_speculations=4"
    with pytest.raises(ValueError, match=whose):
        decoder.open_session(1).add([1], 4, num_speculations=8)
    with pytest.raises(ValueError, match=whose):
        Conversation(decoder).generate([1], 4, num_speculations=8)
    with pytest.raises(ValueError, match=r"num_speculations must be in 1 … 1024, got 1025$"):
        decoder.generate([1], 4, num_speculations=1025)


@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_nan_weights_are_an_error_that_names_layer_and_position(strategy):
    model = tiny_model()
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    recorder = Recorder()
    with pytest.raises(FloatingPointError, match=r"the head after layer 4 .* not finite at position 5"):
        SelfSpeculativeDecoder(model, 1).generate(prompt_of(6), 8, strategy=strategy, streamer=recorder)
    assert len(recorder.groups) == 1, "the prompt, and no token"


@requires_native  # the reference's attention takes NaN from the rows after one
@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_weights_that_turn_bad_later_stop_the_sequence(strategy):
    """An embedding row of NaN is met only once its token was emitted."""
    model = tiny_model(upper="silent")
    decoder = SelfSpeculativeDecoder(model, 1, 4)
    tokens = decoder.generate(prompt_of(6), 12).new_tokens[0].tolist()
    bad = next(index for index in range(4, 12) if tokens[index] not in tokens[:index] + prompt_of(6)[0].tolist())
    model.model.embed_tokens.weight.data[tokens[bad]] = float("nan")
    recorder = Recorder()
    with pytest.raises(FloatingPointError, match=f"not finite at position {6 + bad}"):
        decoder.generate(prompt_of(6), 24, strategy=strategy, streamer=recorder)
    emitted = torch.cat(recorder.groups[1:]).tolist()
    assert emitted == tokens[: len(emitted)]


def test_a_broken_draft_head_is_named():
    decoder = SelfSpeculativeDecoder(tiny_model(), 2, 3, draft_head="int8")
    decoder.draft_head.scale[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the draft head after layer 2 .* position 6"):
        decoder.generate(prompt_of(6), 8)


@requires_native  # as above
def test_an_invalid_draft_after_a_rejected_one_is_ignored(monkeypatch):
    """What follows a rejected draft is no part of the sequence, so its numbers are nobody's business."""
    model = tiny_model()
    plain = SelfSpeculativeDecoder(model, 1).generate(prompt_of(6), 24, strategy="autoregressive")
    decoder = SelfSpeculativeDecoder(model, 1, 4)
    seen = set(plain.sequences[0].tolist())
    drafted = set()

    def recorded(*args, **named):
        done = layerskip_kernels.speculative_round(*args, **named)
        drafted.update(done.tokens.flatten().tolist())
        return done

    with monkeypatch.context() as patch:
        patch.setattr(ROUND, recorded)
        decoder.generate(prompt_of(6), 24)
    wrong = sorted(drafted - seen)
    assert wrong, "no draft was rejected"
    model.model.embed_tokens.weight.data[wrong] = float("nan")
    assert torch.equal(decoder.generate(prompt_of(6), 24).sequences, plain.sequences)


def test_accepting_a_wrong_draft_is_detected(monkeypatch):
    """The mutation that the equality tests exist for: verification accepts one draft too many."""
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4)
    plain = decoder.generate(prompt_of(6), 40, strategy="autoregressive")
    monkeypatch.setattr(ROUND, generous)
    assert not torch.equal(decoder.generate(prompt_of(6), 40).sequences, plain.sequences)


def test_a_conversion_between_calls_takes_a_new_cache():
    decoder = SelfSpeculativeDecoder(tiny_model(), exit_layer=1)
    decoder.generate(prompt_of(5), 4)
    decoder.model.to(torch.bfloat16)
    assert decoder.generate(prompt_of(5), 4).sequences.shape == (1, 9)


def test_weights_that_are_assigned_are_used():
    decoder = SelfSpeculativeDecoder(tiny_model(), exit_layer=1)
    before = decoder.generate(prompt_of(5), 12, eos_token_id=[])
    other = {name: torch.randn_like(weight) for name, weight in decoder.model.state_dict().items()}
    decoder.model.load_state_dict(other, assign=True)
    after = decoder.generate(prompt_of(5), 12, eos_token_id=[])
    assert not torch.equal(before.sequences, after.sequences)
    assert decoder.model.decoder.layer_weights(0, 1)[1] is decoder.model.decoder.layers[0]["q"]


def begun_request() -> Request:
    """A request whose first token is 3; the token 7 ends it."""
    options, acceptance = RequestDefaults(exit_layer=1, num_speculations=4).complete(), AcceptanceRates({})
    model = adapt(tiny_model())
    request = Request(0, model, options, prompt_of(5), 8, SamplingParams(), 0, acceptance, frozenset({7}))
    request.emit(3)
    return request


def test_a_fault_after_a_stop_token_is_ignored():
    """Autoregressive decoding would never have come there."""
    request = begun_request()
    request.emit_round([4, 7, 5, 6], 3, -1, exit_layer=1, fault="logits that are not finite")
    assert request.reason == "eos"
    assert request.output().new_tokens.tolist() == [[3, 4, 7]]


def test_a_fault_before_the_end_is_an_error():
    request = begun_request()
    with pytest.raises(FloatingPointError, match="not finite"):
        request.emit_round([4, 5, 6, 6], 2, -1, exit_layer=1, fault="logits that are not finite")
