"""Which requests share a round, and what the controller picks for those that leave something open."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence

from .controller import Controller, Plan
from .request import Request, RoundKind


def grouped(requests: Iterable[Request]) -> dict[RoundKind, list[Request]]:
    """Requests by the kind of their next round."""
    kinds: dict[RoundKind, list[Request]] = {}
    for request in sorted(requests, key=lambda one: not one.kind().exit_layer):
        kind = request.kind()
        kinds.setdefault(kind if kind.exit_layer else _shared_kind(kind, kinds), []).append(request)
    return kinds


def _shared_kind(kind: RoundKind, others: Iterable[RoundKind]) -> RoundKind:
    """The kind of round for sequences whose drafts are looked up: one in which others speculate, if there is one."""
    return next((one for one in others if one.speculative and one.processed == kind.processed), kind)


def choose(requests: Collection[Request], controller: Controller) -> bool:
    """Let the controller pick for the requests that want it, together for those that leave the same open.

    Returns
    -------
    bool
        Whether the kind of a request's next round changed.
    """
    open_choices: dict[Hashable, list[Request]] = {}
    for request in requests:
        method = request.method
        if method.adaptive:
            given = (method.exit_layer, method.num_speculations, method.exits, request.lookup is not None)
            open_choices.setdefault(given, []).append(request)
    return any([_choose_together(together, controller) for together in open_choices.values()])


def _choose_together(requests: Sequence[Request], controller: Controller) -> bool:
    method = requests[0].method
    acceptances = [request.acceptance for request in requests]
    given = (method.exit_layer, method.num_speculations)
    lookups = [request.lookup for request in requests if request.lookup is not None]
    if lookups:
        plan = controller.plan(acceptances, [one.offer for one in lookups], *given, exits=method.exits)
    else:
        plan = Plan(controller.choose(acceptances, *given), [None] * len(requests))
    changed = False
    for request, count in zip(requests, plan.looked_up, strict=True):
        if request.lookup is not None:
            request.looked_up = None if count is None else request.lookup.proposal[:count]
        if plan.choice.exit_layer and plan.choice != (request.exit_layer, request.num_speculations):
            before = request.kind()
            request.exit_layer, request.num_speculations = plan.choice
            changed = changed or request.kind() != before
    return changed
