"""Training pairs that a model writes itself: its own continuations, for its early exits to learn.

A draft is accepted where it is what the full depth says, so what the full depth says is the best label there is
(self-distillation), needs no labelled data, and leaves what the model writes as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ..decoding import SamplingParams, SelfSpeculativeDecoder
from ..decoding.run import ended_in
from ..decoding.sampling import params_of_each


def own_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 96,
    batch_size: int = 16,
    sampling: SamplingParams | None = None,
    done: Collection[int] = (),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Let a model continue prompts with all its layers, many at once.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of a supported architecture.
    tokenizer : transformers.PreTrainedTokenizer
    prompts : sequence of str
        None is empty.
    max_new_tokens : int
    batch_size : int
        How many are written at once.
    sampling : SamplingParams, optional
        By default greedy. With a seed in it, prompt b has the seed ``seed + b``.
    done : collection of int
        Indices of prompts that are left out, since they were continued before.

    Yields
    ------
    (int, dict)
        A prompt's index and its pair, as `read_pairs` gives them: ``prompt``, ``completion`` and ``cut``, which says
        that the tokenizer's EOS token had not come after ``max_new_tokens``. In the order in which they end.

    Raises
    ------
    ValueError
        For a prompt without a token or too long for the model; nothing was written then.
    """
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompt {index} has no token")
    waiting = sorted(set(range(len(encoded))) - set(done))
    if not waiting:
        return
    decoder = SelfSpeculativeDecoder(model, exit_layer=1, num_speculations=1)
    length = max(map(len, encoded)) + max_new_tokens
    session = decoder.open_session(batch_size, max_seq_len=length, prompt_tokens_per_step=None)
    params = params_of_each(sampling, len(encoded))
    places = {
        session.add(encoded[index], max_new_tokens, strategy="autoregressive", sampling=params[index]): index
        for index in waiting
    }
    for request_id, output in ended_in(session):
        index, tokens = places[request_id], output.new_tokens[0]
        ended = int(tokens[-1]) == tokenizer.eos_token_id  # a pair's end; any other EOS token is text
        said = tokens[:-1] if ended else tokens
        text = tokenizer.decode(said, clean_up_tokenization_spaces=False)  # special tokens read back as such
        yield index, {"prompt": prompts[index], "completion": text, "cut": not ended}
