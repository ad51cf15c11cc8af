"""A conversation: turns over one cache, in which nothing is read twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import validation
from .decoder import SelfSpeculativeDecoder
from .output import GenerationOutput, Streamer
from .run import outputs_of


class Conversation:
    """Turns that continue each other.

    A turn reads only what it adds, and gives the tokens that `SelfSpeculativeDecoder.generate` would give for the whole
    conversation as its prompt.

    Parameters
    ----------
    decoder : SelfSpeculativeDecoder
    max_seq_len : int, optional
        The longest conversation; by default the decoder's.
    num_speculations : int or "auto", optional
        The largest that a turn may ask for; by default the decoder's.

    Attributes
    ----------
    tokens : list of int
        All prompts and continuations so far. To take a turn back, cut it off.
    """

    def __init__(
        self,
        decoder: SelfSpeculativeDecoder,
        max_seq_len: int | None = None,
        num_speculations: int | str | None = None,
    ) -> None:
        self._model = decoder.model
        self._session = decoder.open_session(1, max_seq_len=max_seq_len, num_speculations=num_speculations)
        self.tokens: list[int] = []

    def generate(
        self,
        prompt: Tensor | Sequence[int],
        max_new_tokens: int = 128,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Take a turn.

        Parameters
        ----------
        prompt : Tensor [N] or [1, N], or sequence of int
            What follows the tokens so far.
        max_new_tokens : int
        streamer : Streamer, optional
            As in `SelfSpeculativeDecoder.generate`.
        **options
            As in `Session.add`: ``sampling``, ``eos_token_id``, ``should_stop``, …

        Returns
        -------
        GenerationOutput
            ``sequences`` [1, N + new] are the whole conversation, ``stats.reused`` the tokens that were not read again.

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            As `SelfSpeculativeDecoder.generate`; the tokens stay as they were.
        """
        ids = validation.prompt(prompt, self._model.vocab_size, self._model.device)
        whole = self.tokens + ids[0].tolist()
        request = self._session.add(whole, max_new_tokens, keep=True, **options)
        if streamer is not None:
            streamer.put(ids.cpu())
        try:
            (output,) = outputs_of(self._session, [request], streamer)
        except BaseException:
            if len(self._session):
                self._session.remove(request)
            raise
        self.tokens = output.sequences[0].tolist()
        return output
