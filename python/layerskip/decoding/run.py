"""Running a session to the end of its requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .output import GenerationOutput, Streamer, Update
from .session import Session
from .text import SequenceText


def updates_of(session: Session) -> Iterator[Update]:
    """Run a session until its requests have ended; an error of one of them is raised."""
    while len(session):
        for update in session.step():
            if update.error is not None:
                raise update.error
            yield update


def ended_in(session: Session) -> Iterator[tuple[int, GenerationOutput]]:
    """The ids and outputs of a session's requests, in the order in which they end."""
    return ((one.request_id, one.output) for one in updates_of(session) if one.output is not None)


def outputs_of(session: Session, request_ids: Sequence[int], streamer: Streamer | None) -> list[GenerationOutput]:
    """Run a session until its requests have ended, and return the outputs of these."""
    outputs: dict[int, GenerationOutput] = {}
    for update in updates_of(session):
        if streamer is not None:
            streamer.put(torch.tensor(update.tokens))
        if update.output is not None:
            outputs[update.request_id] = update.output
    if streamer is not None:
        streamer.end()
    return [outputs[request_id] for request_id in request_ids]


def pieces_of(session: Session, text: SequenceText, ready: list[str]) -> Iterator[str]:
    """Run a session's only request; ``ready`` holds the pieces that its stop rule got from ``text``."""
    for update in updates_of(session):
        if update.reason == "eos":  # the one token that no rule is asked about
            ready.append(text.push(update.tokens[-1]))
        if update.finished:
            ready.append(text.finish())
        yield from filter(None, ready)
        ready.clear()
