"""The reduced draft head: which tokens it takes, that it only costs acceptance, and that it survives saving."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCABULARY, prompt_of, tiny_model

from layerskip import DraftHead, SelfSpeculativeDecoder
from layerskip.models import adapt

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [[5, 5, 5, 9, 9, 70], [9, 5, 70, 70, 33]]


def test_it_takes_the_most_frequent_tokens_and_the_stop_tokens():
    head = DraftHead.from_tokens(TEXTS, VOCABULARY, eos_token_id=[98, 99], size=5)
    assert head.token_ids.tolist() == [5, 9, 70, 98, 99]
    assert DraftHead.from_tokens(TEXTS, VOCABULARY, 2, size=3).token_ids.tolist() == [2, 5, 9]


def test_the_lowest_ids_fill_up():
    assert DraftHead.from_tokens(TEXTS, VOCABULARY, 99, size=7).token_ids.tolist() == [0, 1, 5, 9, 33, 70, 99]
    assert DraftHead.from_tokens([], VOCABULARY, 99, size=VOCABULARY).token_ids.tolist() == list(range(VOCABULARY))


def test_its_rows_are_those_of_the_model_in_int8():
    model = adapt(tiny_model())
    head = SelfSpeculativeDecoder(model, 1, draft_head=DraftHead([70, 5, 9, 5], VOCABULARY)).draft_head
    assert head.head_weight.dtype == torch.int8
    assert head.token_map.tolist() == [5, 9, 70]
    rows = head.head_weight.float() * head.scale[:, None]
    step = model.head.head_weight[[5, 9, 70]].abs().amax(1, keepdim=True) / 127
    assert ((rows - model.head.head_weight[[5, 9, 70]]).abs() <= step / 2 * 1.001).all()
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    assert set(head(hidden).token.tolist()) == {5, 9, 70}


def test_a_small_head_costs_acceptance_and_changes_nothing_else():
    model = tiny_model(upper="silent")
    plain = SelfSpeculativeDecoder(model, 1).generate(prompt_of(5), 60, strategy="autoregressive")
    tokens = plain.new_tokens[0].unique().tolist()
    rates = []
    for size in (1, len(tokens) // 2, len(tokens)):
        out = SelfSpeculativeDecoder(model, 1, 4, draft_head=DraftHead(tokens[:size], VOCABULARY)).generate(
            prompt_of(5), 60
        )
        assert torch.equal(out.sequences, plain.sequences)
        rates.append(out.stats.acceptance_rate)
    assert rates == sorted(rates)
    assert rates[0] < 0.5 < 0.8 < rates[2]


@pytest.mark.parametrize("as_directory", [True, False])
def test_it_is_saved_beside_a_model(tmp_path, as_directory):
    head = DraftHead.from_tokens(TEXTS, VOCABULARY, 99, size=7)
    path = head.save(tmp_path if as_directory else tmp_path / "mine.safetensors")
    assert path.name == ("draft_head.safetensors" if as_directory else "mine.safetensors")
    again = DraftHead.load(tmp_path if as_directory else path)
    assert torch.equal(again.token_ids, head.token_ids)
    assert again.vocab_size == VOCABULARY
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "no temporary file is left"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = DraftHead([1, 2], VOCABULARY).save(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        DraftHead([1, 2, 3], VOCABULARY).save(tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="at least one token"):
        DraftHead([], VOCABULARY)
    with pytest.raises(ValueError, match=f"token id {VOCABULARY} is outside"):
        DraftHead([VOCABULARY], VOCABULARY)
    with pytest.raises(ValueError, match=f"size must be in 1 … {VOCABULARY}, the vocabulary, got 102"):
        DraftHead.from_tokens(TEXTS, VOCABULARY, 99, size=102)
    with pytest.raises(ValueError, match="token id -4 is outside"):
        DraftHead.from_tokens([[1, -4]], VOCABULARY, 99, size=4)
    with pytest.raises(ValueError, match="eos_token_id 200 is outside"):
        DraftHead.from_tokens(TEXTS, VOCABULARY, 200, size=4)
    with pytest.raises(ValueError, match="for a vocabulary of 64, the model has 101"):
        SelfSpeculativeDecoder(tiny_model(), 1, draft_head=DraftHead([1], 64))
    with pytest.raises(FileNotFoundError, match="no draft head at"):
        DraftHead.load(tmp_path)
    (tmp_path / "draft_head.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is not a draft head"):
        DraftHead.load(tmp_path)
