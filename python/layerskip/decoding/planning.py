"""What the running requests of a session do next: what the controller picks, who shares a round, what it learns."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from .controller import Controller, Plan
from .request import Request, RoundKind


def choose(running: Iterable[Request], controller: Controller) -> bool:
    """Let the controller pick for the requests that want it, together for those that leave the same open.

    Returns
    -------
    bool
        Whether the kind of a request's next round changed.
    """
    open_choices: dict[Hashable, list[Request]] = {}
    for request in running:
        method = request.method
        if method.adaptive:
            given = (method.exit_layer, method.num_speculations, method.exits, request.lookup is not None)
            open_choices.setdefault(given, []).append(request)
    changed = [_choose_together(requests, controller) for requests in open_choices.values()]
    return any(changed)


def _choose_together(requests: Sequence[Request], controller: Controller) -> bool:
    method, changed = requests[0].method, False
    acceptances = [request.acceptance for request in requests]
    for request in requests:
        request.acceptance.behind = request.behind
    given = (method.exit_layer, method.num_speculations)
    lookups = [request.lookup for request in requests if request.lookup is not None]
    if lookups:
        plan = controller.plan(acceptances, [one.offer for one in lookups], *given, exits=method.exits)
    else:
        plan = Plan(controller.choose(acceptances, *given), [None] * len(requests))
    for request, count in zip(requests, plan.looked_up, strict=True):
        if request.lookup is not None:
            request.looked_up = None if count is None else request.lookup.proposal[:count]
        if plan.choice.exit_layer and plan.choice != (request.exit_layer, request.num_speculations):
            before = request.kind()
            request.exit_layer, request.num_speculations = plan.choice
            changed = changed or request.kind() != before
    return changed


def by_kind(running: Iterable[Request]) -> dict[RoundKind, list[Request]]:
    """The requests whose next round is the same. Drafts that are looked up go along where others speculate."""
    kinds: dict[RoundKind, list[Request]] = {}
    for request in sorted(running, key=lambda one: not one.kind().exit_layer):
        kind = request.kind()
        kinds.setdefault(kind if kind.exit_layer else _shared(kind, kinds), []).append(request)
    return kinds


def _shared(kind: RoundKind, others: Iterable[RoundKind]) -> RoundKind:
    """The kind of round for sequences whose drafts are looked up: one in which others speculate, if there is one."""
    return next((one for one in others if one.speculative and one.processed == kind.processed), kind)


def learn(kind: RoundKind, request: Request, emitted: list[int], num_drafted: int) -> None:
    """Note what was accepted, and what would have been of a proposal that was not drafted."""
    if not request.method.adaptive:
        return
    if request.looked_up is None:
        request.acceptance.observe(kind.exit_layer, len(emitted) - 1, num_drafted)
    if request.lookup is not None:
        request.acceptance.observe_proposal(request.lookup.offer.kind, request.lookup.proposal, emitted)
