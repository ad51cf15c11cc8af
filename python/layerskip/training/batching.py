"""Training pairs as token ids, and their batches; pairs that a model generates (self-distillation)."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..decoding import SamplingParams, SelfSpeculativeDecoder
from ..decoding.sampling import params_of_each
from .curriculum import generator
from .losses import IGNORE

Pair = Mapping[str, list[int]]  # input_ids and labels
BUCKET = 50  # batches that are sorted by length together


def encode_pair(
    tokenizer: Any, prompt: str, completion: str, max_length: int, whole: bool = False, cut: bool = False
) -> dict[str, list[int]]:
    """Encode prompt, completion and EOS token; label the completion, or everything if ``whole``.

    Prompt and completion are tokenized separately, as in generation. A ``cut`` completion gets no EOS token, nor does a
    whole text without a prompt, which is a passage of a longer one.
    """
    context = list(tokenizer(prompt).input_ids) if prompt else []
    target = list(tokenizer(completion, add_special_tokens=False).input_ids)
    if not cut and (context or not whole):
        target.append(tokenizer.eos_token_id)
    ids = (context + target)[:max_length]
    labels = [IGNORE, *ids[1:]] if whole else [IGNORE] * len(context) + target  # no token precedes the first
    return {"input_ids": ids, "labels": labels[:max_length]}


def encode(
    tokenizer: Any, examples: Sequence[Any], max_length: int = 1024, whole: bool = False
) -> list[dict[str, list[int]]]:
    """Encode examples, objects or dicts with ``prompt``, ``completion`` and optionally ``cut``.

    Examples without a label within ``max_length`` are dropped. With ``whole``, prompts are labelled, too.

    Raises
    ------
    ValueError
        If nothing is left, or an example lacks a field (with its index).
    """
    pairs = []
    for index, example in enumerate(examples):
        fields = example if isinstance(example, Mapping) else vars(example)
        for name in ("prompt", "completion"):
            if not isinstance(fields.get(name), str):
                raise ValueError(f"example {index} has no text {name!r}: {fields}")
        texts = fields["prompt"], fields["completion"]
        pairs.append(encode_pair(tokenizer, *texts, max_length, whole, fields.get("cut", False)))
    kept = [pair for pair in pairs if any(label != IGNORE for label in pair["labels"][1:])]
    if not kept:
        raise ValueError(f"none of {len(pairs)} examples has a completion within {max_length} tokens")
    return kept


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file of ``prompt``, ``completion`` and optionally ``cut``; ValueError names a broken line."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("prompt", "completion")):
            raise ValueError(f"{path}:{number}: expected an object with texts 'prompt' and 'completion', got {line!r}")
        if not isinstance(pair.get("cut", False), bool):
            raise ValueError(f"{path}:{number}: expected true or false under 'cut', got {pair['cut']!r}")
        pairs.append(pair)
    return pairs


class Collator:
    """Pad on the right to the longest of the batch.

    Needs no attention mask: under a causal mask no token sees the padding behind it, and padding has no label.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, pairs: Sequence[Any]) -> dict[str, Tensor]:
        """Batch ``input_ids`` and ``labels``, [B, S], of pairs, or of the single list of pairs that `Pool` gives."""
        if isinstance(pairs[0], list):
            (pairs,) = pairs
        length = max(len(pair["input_ids"]) for pair in pairs)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([pair[key] + [value] * (length - len(pair[key])) for pair in pairs])

        return {"input_ids": padded("input_ids", self.pad_token_id), "labels": padded("labels", IGNORE)}


class LengthBuckets(Sampler[int]):
    """Shuffle so that the examples of a batch have similar lengths; a function of (seed, epoch)."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        source = generator("order", self.seed, self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=source).tolist()
        size = self.batch_size * BUCKET
        ordered = [
            index
            for begin in range(0, len(shuffled), size)
            for index in sorted(shuffled[begin : begin + size], key=lambda index: self.lengths[index])
        ]
        full = len(ordered) // self.batch_size  # a short batch stays the last, where the loader expects it
        for batch in torch.randperm(full, generator=source).tolist():
            yield from ordered[batch * self.batch_size : (batch + 1) * self.batch_size]
        yield from ordered[full * self.batch_size :]


class Pool(Dataset[list[Pair]]):
    """Training pairs and replayed pairs as one dataset; an item is a batch, given by the indices of its pairs."""

    def __init__(self, pairs: Sequence[Pair], replayed: Sequence[Pair] = ()) -> None:
        self.pairs, self.replayed = pairs, replayed

    def __len__(self) -> int:
        return len(self.pairs) + len(self.replayed)

    def __getitem__(self, indices: Sequence[int]) -> list[Pair]:
        own = len(self.pairs)
        return [self.pairs[index] if index < own else self.replayed[index - own] for index in indices]


def token_batches(lengths: Sequence[int], budget: int, order: Sequence[int]) -> list[list[int]]:
    """Batch examples of similar lengths; a batch of several has at most ``budget`` tokens, with padding.

    ``order`` decides which examples of equal length share a batch, not the number or the lengths of the batches.
    """
    batches: list[list[int]] = []
    for index in sorted(order, key=lambda index: lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class TokenBatches(Sampler[list[int]]):
    """Shuffled batches of a `Pool`, by a budget of padded tokens; a function of (seed, epoch).

    An epoch visits every training pair once. With ``replay_budget``, which a pool without replayed pairs must not have,
    ``ranks`` training batches and ``ranks`` replayed batches alternate, ``ranks`` being the number of processes.
    """

    def __init__(self, pool: Pool, budget: int, replay_budget: int, seed: int, ranks: int = 1) -> None:
        if bool(pool.replayed) != bool(replay_budget):
            raise ValueError(f"a replay budget of {replay_budget} meets {len(pool.replayed)} pairs to replay")
        self.lengths = [len(pair["input_ids"]) for pair in (*pool.pairs, *pool.replayed)]
        self.own, self.budget, self.replay_budget = len(pool.pairs), budget, replay_budget
        self.seed, self.ranks, self.epoch = seed, ranks, 0
        batches = len(token_batches(self.lengths, budget, range(self.own)))
        self.batches = batches - batches % ranks if replay_budget else batches
        if not self.batches:
            raise ValueError(f"{self.own} pairs make {batches} batches of {budget} tokens, too few for {ranks} ranks")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * (2 if self.replay_budget else 1)

    def __iter__(self) -> Iterator[list[int]]:
        own = self._shuffled("order", self.epoch, range(self.own), self.budget)[: self.batches]
        if not self.replay_budget:
            yield from own
            return
        replayed = self._replayed()
        for begin in range(0, len(own), self.ranks):
            yield from own[begin : begin + self.ranks]
            yield from (next(replayed) for _ in range(self.ranks))

    def _shuffled(self, purpose: str, epoch: int, indices: range, budget: int) -> list[list[int]]:
        source = generator(purpose, self.seed, epoch)
        order = [indices[place] for place in torch.randperm(len(indices), generator=source).tolist()]
        batches = token_batches(self.lengths, budget, order)
        return [batches[place] for place in torch.randperm(len(batches), generator=source).tolist()]

    def _replayed(self) -> Iterator[list[int]]:
        """Yield replayed batches endlessly; an epoch continues where the previous one stopped."""
        indices = range(self.own, len(self.lengths))
        count = len(token_batches(self.lengths, self.replay_budget, indices))
        passes, skipped = divmod(self.epoch * self.batches, count)
        while True:
            yield from self._shuffled("replay", passes, indices, self.replay_budget)[skipped:]
            passes, skipped = passes + 1, 0


def own_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 96,
    batch_size: int = 16,
    sampling: SamplingParams | None = None,
    done: Collection[int] = (),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Continue prompts with all layers of a transformers model, ``batch_size`` at once.

    Skips the indices in ``done``. Sampling is greedy by default; with a seed, prompt b has the seed ``seed + b``.
    Yields a prompt's index and its pair, as `read_pairs` gives them, in the order in which they end. ``cut`` means that
    the tokenizer's EOS token did not come within ``max_new_tokens``. ValueError, before anything is generated, for a
    prompt that has no token or is too long for the model.
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
    indices = {
        session.add(encoded[index], max_new_tokens, strategy="autoregressive", sampling=params[index]): index
        for index in waiting
    }
    for update in session.run():
        if update.output is None:
            continue
        index, tokens = indices[update.request_id], update.output.new_tokens[0]
        ended = int(tokens[-1]) == tokenizer.eos_token_id  # any other EOS token of the model is text
        # keeps special tokens, so that encoding the text gives the same ids
        text = tokenizer.decode(tokens[:-1] if ended else tokens, clean_up_tokenization_spaces=False)
        yield index, {"prompt": prompts[index], "completion": text, "cut": not ended}
