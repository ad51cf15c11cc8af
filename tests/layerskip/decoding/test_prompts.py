"""What is taken for prompts: ids with and without padding, one or many, and text; the text of the result."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, prompt_of, requires_native, tiny_model
from tokenizers_of import KINDS

from layerskip import Conversation, SelfSpeculativeDecoder

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
def test_holes_in_a_mask_are_refused(decoder, place):
    mask = torch.tensor([[1] * 6, [1] * 6])
    mask[1, place] = 0
    with pytest.raises(ValueError, match=f"attention_mask has a hole at position {place} of prompt 1"):
        decoder.generate(torch.ones(2, 6, dtype=torch.int64), NEW, attention_mask=mask)


# One rule for all that take a prompt


def generated(decoder, prompt):
    return decoder.generate(prompt, NEW).new_tokens[0].tolist()


def streamed(decoder, prompt):
    return "".join(decoder.stream(prompt, NEW))


def added(decoder, prompt):
    session = decoder.open_session(1)
    session.add(prompt, NEW)
    return [token for update in session.run() for token in update.tokens]


def conversed(decoder, prompt):
    return Conversation(decoder).generate(prompt, NEW).new_tokens[0].tolist()


WAYS = (generated, streamed, added, conversed)


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_prompt_is_the_same_prompt(decoder, way):
    text = "QED.SO"
    ids = decoder.tokenizer(text).input_ids
    padded_ids = decoder.tokenizer(text, padding="max_length", max_length=len(ids) + 4)
    assert 0 in padded_ids.attention_mask
    expected = way(decoder, ids)
    kinds = [
        text, [text], tuple(ids), [ids], torch.tensor(ids), torch.tensor([ids]), torch.tensor(ids, dtype=torch.int32),
        np.array(ids), np.array([ids], dtype=np.uint16), list(np.array(ids)), [np.array(ids)],
        decoder.tokenizer(text), decoder.tokenizer([text]), decoder.tokenizer(text, return_tensors="np"),
        decoder.tokenizer(text, return_tensors="pt"), padded_ids, {"input_ids": ids},
    ]  # fmt: skip
    for kind in kinds:
        assert way(decoder, kind) == expected, kind


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "the prompt is empty"),
        (np.zeros((1, 0), np.int64), ValueError, "the prompt is empty"),
        (np.ones(3), TypeError, "input_ids has dtype float64, expected int64"),
        (np.array([True]), TypeError, "input_ids has dtype bool, expected int64"),
        (np.array([2**64 - 1], np.uint64), ValueError, "outside the vocabulary"),
        (np.int64(3), TypeError, "got int64"),
        (np.ones((1, 1, 1), np.int64), ValueError, r"shape \[1, 1, 1\], expected \[N\] or \[B, N\]"),
        (b"QED", TypeError, "got bytes"),
        (None, TypeError, "got NoneType"),
        ({"ids": [1]}, ValueError, "a tokenizer's output has input_ids, got only ids"),
        ({"input_ids": [3, 4], "attention_mask": [1]}, ValueError, "attention_mask has shape"),
        ([[3, VOCABULARY]], ValueError, f"token id {VOCABULARY} is outside"),
    ],
)
def test_what_is_no_prompt_is_refused_alike(decoder, way, prompt, error, message):
    with pytest.raises(error, match=message):
        way(decoder, prompt)


@pytest.mark.parametrize("way", WAYS[1:])
def test_one_prompt_is_taken_where_there_is_one_sequence(decoder, way):
    for two in (["A", "B"], torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="one prompt is taken here, got 2"):
            way(decoder, two)


def test_a_mask_is_given_once(decoder):
    with pytest.raises(ValueError, match="not both"):
        decoder.generate(decoder.tokenizer("A"), NEW, attention_mask=[[1]])


def test_only_the_first_text_of_a_conversation_gets_special_tokens(decoder, monkeypatch):
    given = []

    def tokenizer(text, add_special_tokens=True):
        given.append((text, add_special_tokens))
        return SimpleNamespace(input_ids=[5, 6])

    monkeypatch.setattr(decoder, "tokenizer", tokenizer)
    chat = Conversation(decoder)
    chat.generate("one", 2)
    chat.generate("two", 2)
    session = decoder.open_session(2)
    first = session.add("three", 2, keep=True)
    list(session.run())
    session.add("four", 2, continue_from=first)
    assert given == [("one", True), ("two", False), ("three", True), ("four", False)]


# Text of the result


def test_the_text_of_an_output_is_what_stream_yields(decoder):
    prompts = ["QED.SO", "A", "WHY;NO"]
    texts = ["".join(decoder.stream(one, NEW)) for one in prompts]
    assert len(set(map(len, texts))) > 1 or len(set(texts)) > 1
    assert decoder.generate(prompts, NEW).text == texts
    assert decoder.generate(prompts[0], NEW).text == texts[0]
    assert decoder.generate(prompts[:1], NEW).text == texts[0]
    assert Conversation(decoder).generate(prompts[1], NEW).text == texts[1]
    session = decoder.open_session(1)
    session.add(prompts[2], NEW)
    assert [update.output.text for update in session.run() if update.finished] == texts[2:]


def test_the_text_of_sequences_that_end_early_has_no_padding(decoder):
    prompts = ["QED.SO", "A"]
    free = decoder.generate(prompts, NEW)
    out = decoder.generate(prompts, NEW, eos_token_id=int(free.new_tokens[0, 3]), pad_token_id=PAD)
    lengths = [row.new_tokens for row in out.per_sequence]
    assert min(lengths) < max(lengths)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    rows = [row[:count] for row, count in zip(out.new_tokens.tolist(), lengths, strict=True)]
    assert out.text == [decoder.tokenizer.decode(row, **options) for row in rows]


def test_the_text_needs_a_tokenizer(decoder):
    bare = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1)
    with pytest.raises(ValueError, match=r"the text needs a tokenizer: set decoder\.tokenizer"):
        _ = bare.generate(prompt_of(3), NEW).text
    assert bare.generate("A", NEW, tokenizer=decoder.tokenizer).text == decoder.generate("A", NEW).text
