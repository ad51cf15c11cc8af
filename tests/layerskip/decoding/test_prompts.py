"""What `generate` takes for prompts: ids with and without padding, one or many, and text."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt_of, requires_native, tiny_model
from tokenizers_of import KINDS

from layerskip import SelfSpeculativeDecoder
from layerskip.decoding.decoder import prompts_of

pytestmark = pytest.mark.usefixtures("one_thread")
NEW, PAD = 10, 3
LENGTHS = (3, 8, 1, 6)


@pytest.fixture(scope="module")
def decoder():
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1)
    decoder.tokenizer = KINDS["byte_level"]()
    decoder.tokenizer.pad_token = decoder.tokenizer.eos_token
    return decoder


def padded(rows, side):
    """Ids [B, N] and their mask."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


@requires_native
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32, list])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_ignored(decoder, side, kind):
    rows = [prompt_of(length, length)[0] for length in LENGTHS]
    ids, mask = padded(rows, side)
    mask = mask.tolist() if kind is list else mask.to(kind)
    expected = decoder.generate(rows, NEW)
    for given in (ids, ids.tolist()):
        out = decoder.generate(given, NEW, attention_mask=mask)
        assert torch.equal(out.sequences, expected.sequences)


def test_padding_tokens_may_be_any_id(decoder):
    """As a vocabulary without a padding token has them: any id, also one that is no token."""
    row = prompt_of(5)
    ids = torch.cat([torch.full((1, 2), -100), row], 1)
    out = decoder.generate(ids, NEW, attention_mask=ids >= 0)
    assert torch.equal(out.sequences, decoder.generate(row, NEW).sequences)


def test_one_prompt(decoder):
    row = prompt_of(6)
    expected = decoder.generate(row, NEW).sequences
    for one in (row[0], row[0].tolist(), tuple(row[0].tolist()), [row[0]], [row[0].tolist()]):
        assert torch.equal(decoder.generate(one, NEW).sequences, expected)
    ids, mask = torch.cat([torch.tensor([PAD, PAD]), row[0]]), torch.tensor([0, 0] + [1] * 6)
    assert torch.equal(decoder.generate(ids, NEW, attention_mask=mask).sequences, expected)


def test_text(decoder):
    texts = ["QED.SO", "A", "WHY;NO"]
    rows = [decoder.tokenizer(text).input_ids for text in texts]
    expected = decoder.generate(rows, NEW).sequences
    assert torch.equal(decoder.generate(texts, NEW).sequences, expected)
    one = decoder.generate(texts[0], NEW)
    assert torch.equal(one.sequences, decoder.generate([rows[0]], NEW).sequences)
    other = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1)
    assert torch.equal(other.generate(texts, NEW, tokenizer=decoder.tokenizer).sequences, expected)
    stop = decoder.tokenizer.decode(one.new_tokens[0, 4:6])
    ours = other.generate(texts[0], NEW, tokenizer=decoder.tokenizer, stop_strings=stop)
    assert torch.equal(ours.sequences, decoder.generate(texts[0], NEW, stop_strings=stop).sequences)
    assert ours.reasons == ("stop",)


def test_tokenizer_output_can_be_passed_directly(decoder):
    encoded = decoder.tokenizer(["QED.SO", "A"], return_tensors="pt", padding=True, return_token_type_ids=False)
    expected = decoder.generate(["QED.SO", "A"], NEW).sequences
    assert torch.equal(decoder.generate(**encoded, max_new_tokens=NEW).sequences, expected)


@pytest.mark.parametrize("place", range(1, 5))
def test_holes_in_a_mask_are_refused(place):
    mask = torch.tensor([[1] * 6, [1] * 6])
    mask[1, place] = 0
    with pytest.raises(ValueError, match=f"attention_mask has a hole at position {place} of prompt 1"):
        prompts_of(torch.ones(2, 6, dtype=torch.int64), mask)
