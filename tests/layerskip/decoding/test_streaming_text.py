"""Text of tokens as they come: nothing is taken back, nothing is split, and it ends at the first stop string."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers_of import END, KINDS, START, TEXT

from layerskip.decoding.detokenizer import Detokenizer, SequenceText

TEXTS = st.one_of(
    st.text(alphabet="ab €ü草😀\n,.", max_size=30),
    st.lists(st.sampled_from([*TEXT[0].split(" "), "👩‍🚀", "naïve", START, " ", "\n\n"])).map(" ".join),
)


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request):
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def byte_level():
    return KINDS["byte_level"]()


class Letters:
    """A tokenizer whose tokens are their own text."""

    all_special_ids = ()
    added_tokens_decoder: dict = {}  # noqa: RUF012

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, tokens, **kwargs):
        return "".join(self.pieces[token] for token in tokens)


def whole(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def run(tokenizer, tokens, prompt=(), **options):
    """The pieces, one a token, and what came at the end."""
    text = SequenceText(tokenizer, **{"skip_special_tokens": False, **options})
    if prompt:
        text.start_after(prompt)
    pieces = [text.push(token) for token in tokens]
    return [*pieces, text.finish()], text.stopped


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_pieces_make_the_text(tokenizer, text):
    tokens = tokenizer(text).input_ids
    pieces, stopped = run(tokenizer, tokens)
    assert "".join(pieces) == whole(tokenizer, tokens)
    assert not stopped
    if "[UNK]" not in "".join(pieces):
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, text=TEXTS)
def test_prompt_and_pieces_make_the_text(tokenizer, prompt, text):
    before, after = tokenizer(prompt).input_ids, tokenizer(text).input_ids
    pieces, _ = run(tokenizer, after, before)
    assert whole(tokenizer, before) + "".join(pieces) == whole(tokenizer, before + after)


@settings(max_examples=400, deadline=None)
@given(tokens=st.lists(st.integers(2, 329), max_size=12))
@example(tokens=[96, 96, 96, 259, 96, 96])  # a character after three bytes that are none
def test_any_bytes_make_the_text(byte_level, tokens):
    """Random tokens are no valid UTF-8."""
    pieces, _ = run(byte_level, tokens)
    assert "".join(pieces) == whole(byte_level, tokens)


def test_characters_come_whole_and_at_once(byte_level):
    tokens = byte_level("a𝄞b").input_ids
    assert len(tokens) == 6
    assert run(byte_level, tokens)[0] == ["a", "", "", "", "𝄞", "b", ""]
    assert run(byte_level, tokens[:3])[0] == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_bytes_after_bytes():
    """Byte fallback decodes a run of bytes as a whole, or not at all."""
    tokenizer = KINDS["sentencepiece"]()
    tokens = [token for token in tokenizer("😀€").input_ids if tokenizer.decode([token])]
    pieces = run(tokenizer, tokens)[0]
    assert pieces == ["", "", "", "😀", "", "", "€", ""]
    assert run(tokenizer, tokens[:5])[0] == ["", "", "", "😀", "", "\N{REPLACEMENT CHARACTER}"]


def test_invalid_bytes_are_not_held_back(byte_level):
    (lonely,) = [token for token in byte_level("é").input_ids[1:]]
    pieces, _ = run(byte_level, [lonely] * 20)
    assert sum(bool(piece) for piece in pieces[:-1]) >= 3
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 20


def test_the_space_before_a_first_word():
    tokenizer = KINDS["sentencepiece"]()
    hello, the = tokenizer("draft").input_ids, tokenizer("the").input_ids
    assert "".join(run(tokenizer, the)[0]) == "the"
    assert "".join(run(tokenizer, the, hello)[0]) == " the"


def test_special_tokens(byte_level):
    tokens = byte_level(f"a{START}b😀{END}").input_ids
    assert "".join(run(byte_level, tokens)[0]) == f"a{START}b😀{END}"
    assert "".join(run(byte_level, tokens, skip_special_tokens=True)[0]) == "ab😀"


def test_a_special_token_ends_an_incomplete_character(byte_level):
    tokens = [*byte_level("a𝄞").input_ids[:3], byte_level.eos_token_id]
    assert "".join(run(byte_level, tokens)[0]) == "a\N{REPLACEMENT CHARACTER}" + END


# Words over few letters, so that stop strings overlap themselves and each other.
WORDS = st.text(alphabet="ab", min_size=1, max_size=4)


def oracle(text, strings):
    """Where the text ends, read letter by letter: start and end of the stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(string) for string in strings if text[:end].endswith(string)]
        if starts:
            return min(starts), end
    return None


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text(alphabet="ab", max_size=5), max_size=8), strings=st.lists(WORDS, max_size=3))
def test_stop_strings_against_reading_letter_by_letter(pieces, strings):
    text, found = "".join(pieces), oracle("".join(pieces), strings)
    for include in (False, True):
        given_out, stopped = run(Letters(pieces), range(len(pieces)), stop_strings=strings, include_stop_string=include)
        assert stopped == (found is not None)
        assert "".join(given_out) == (text if found is None else text[: found[include]])
        for step in range(len(pieces)):
            now, visible = "".join(pieces[: step + 1]), "".join(given_out[: step + 1])
            if oracle(now, strings) is None:  # no more is held back than may become a stop string
                held = now[len(visible) :]
                assert now.startswith(visible)
                assert not held or any(string.startswith(held) and held != string for string in strings)


def test_the_first_token_that_completes_a_stop_string_ends_the_text(byte_level):
    tokens = byte_level("one two\n\nthree").input_ids
    text = SequenceText(byte_level, "\n\n")
    count = next(index for index, token in enumerate(tokens) if text.push(token) is not None and text.stopped)
    assert whole(byte_level, tokens[: count + 1]) == "one two\n\n"
    assert text.push(tokens[count + 1]) == ""
    assert text.finish() == ""


def test_a_stop_string_over_several_tokens_and_within_one():
    pieces = ["keep <", "st", "op", "> on", "x<stop>y"]
    assert "".join(run(Letters(pieces), [0, 1, 2, 3], stop_strings="<stop>")[0]) == "keep "
    assert "".join(run(Letters(pieces), [0, 1, 4], stop_strings=["<stop>"])[0]) == "keep <stx"
    assert "".join(run(Letters(pieces), [0, 1], stop_strings="<stop>")[0]) == "keep <st"


def test_a_special_token_is_a_stop_string(byte_level):
    tokens = byte_level(f"a b\n{START}c").input_ids
    for skip in (False, True):
        options = {"skip_special_tokens": skip, "stop_strings": f"\n{START}"}
        assert "".join(run(byte_level, tokens, **options)[0]) == "a b"


def test_stop_strings_in_the_prompt_are_ignored(byte_level):
    before, after = byte_level("stop st").input_ids, byte_level("op it").input_ids
    assert "".join(run(byte_level, after, before, stop_strings="stop")[0]) == "op it"


@pytest.mark.parametrize(("value", "error"), [("", ValueError), (["a", ""], ValueError), ([1], TypeError)])
def test_invalid_stop_strings(byte_level, value, error):
    if value == "":
        assert run(byte_level, [], stop_strings=[])[1] is False
    with pytest.raises(error, match="stop_strings must"):
        SequenceText(byte_level, value if value != "" else [""])


def test_pieces_say_what_is_special(byte_level):
    detokenizer = Detokenizer(byte_level)
    (piece,) = detokenizer.push(byte_level.eos_token_id)
    assert piece == (END, True)
    assert detokenizer.finish() == []
