"""Bugs of decoding: rounds, sessions, sources, sampling."""

from __future__ import annotations

from .mutation import LAYERSKIP, Mutation

DECODING = "python/layerskip/decoding/"
INTERRUPTS = LAYERSKIP + "decoding/test_interrupts.py"
PROMPTS, EXITS = LAYERSKIP + "decoding/test_session_prompts.py", LAYERSKIP + "decoding/test_exit_decoding.py"

BUGS = [
    Mutation(
        "an exit's draft layers do not read prompts", DECODING + "scheduler.py",
        '"draft_layers": first.num_prefill_layers > first.num_layers', '"draft_layers": False',
        EXITS + " -k torch_matmuls",
    ),
    Mutation(
        "an exit's draft layers do not read what was looked up", DECODING + "batch.py",
        "catch_up_draft_layers(self._model, self._cache, request, request.position)",
        "request.num_draft_cached = request.position", EXITS + " -k lookup",
    ),
    Mutation(
        "draft layers do not read what was looked up before a request continues it", DECODING + "scheduler.py",
        " and source.num_draft_cached < length:", " and False:", EXITS + " -k continuing",
    ),
    Mutation(
        "an exit drafts on a row that its draft layers have not read", DECODING + "scheduler.py",
        "if other.num_prefill_layers < request.num_prefill_layers:", "if False:", EXITS + " -k continuing",
    ),
    Mutation(
        "a request that has ended keeps its slot", DECODING + "scheduler.py",
        "if one is None or (one.reason is not None and not one.retained)", "if one is None",
        PROMPTS + " -k cancelling_frees",
    ),
    Mutation(
        "a request that is cancelled during its prefill is retained", DECODING + "request.py",
        "return self.keep and self.started and", "return self.keep and", PROMPTS + " -k cancelling_frees",
    ),
    Mutation(
        "a call that is interrupted after the step has emptied its updates", DECODING + "session.py",
        "        self._due = {}  # no call or loop between this and the return: Python handles signals only there\n",
        "        self._due = {}\n        time.sleep(0)\n", INTERRUPTS + " -k at_every_place",
    ),
    Mutation(
        "a rule's answer is noted after the token that it ends with", DECODING + "request.py",
        "            self._stop_length = count if stops else 0\n            self.new_tokens.append(token)\n",
        "            self.new_tokens.append(token)\n            self._stop_length = count if stops else 0\n",
        INTERRUPTS + " -k rule_ends",
    ),
    Mutation(
        "after an interrupt the batches go on as they were", DECODING + "session.py",
        "self._batches, self._members = [], ([], [])\n            for", "for", INTERRUPTS + " -k at_every_place",
    ),
    Mutation(
        "a slot is copied over before it is evicted", DECODING + "scheduler.py",
        "evicted.keep = False", "pass", INTERRUPTS + " -k evicted",
    ),
    Mutation(
        "a run that is left drops its other updates", DECODING + "session.py",
        "                del self._due[request.id]\n", "                self._due = {}\n", INTERRUPTS + " -k left_run",
    ),
    Mutation(
        "two threads may call a session at once", DECODING + "session.py",
        "if other is not None and other is not caller:", "if False:", INTERRUPTS + " -k second_thread",
    ),
    Mutation(
        "a prompt is read in pieces that overlap", DECODING + "scheduler.py",
        "request.num_prefilled += hidden.shape[1]", "request.num_prefilled += max(1, hidden.shape[1] - 1)",
        PROMPTS + " -k prefill_is_unlimited",
    ),
    Mutation(
        "memory is freed while a GPU's round uses it", DECODING + "cuda_graphs.py",
        "while a round runs.\n        self.finish()", "while a round runs.\n        pass",
        LAYERSKIP + "decoding/test_graph.py -k may_be_dropped",
    ),
    Mutation(
        "every number of drafts that are looked up is recorded", DECODING + "batch.py",
        "LOOKUP_MULTIPLE = 4", "LOOKUP_MULTIPLE = 1",
        LAYERSKIP + "decoding/test_graph.py -k any_number",
    ),
    Mutation(
        "the host waits for what it sends to a card", "python/layerskip/devices.py", "non_blocking=True",
        "non_blocking=False", LAYERSKIP + "test_sending.py",
    ),
    Mutation(
        "prompts have the time of the longest round", DECODING + "scheduler.py",
        "shortest = min(self._rounds)", "shortest = max(self._rounds)", LAYERSKIP + "decoding/test_budget.py",
    ),
    Mutation(
        "a step reads whatever its round took", DECODING + "scheduler.py",
        "(LONGEST_STEP + 1 - _GOAL) * shortest", "-math.inf", LAYERSKIP + "decoding/test_budget.py",
    ),
    Mutation(
        "a smaller pass is foreseen without its fixed cost", DECODING + "scheduler.py",
        "fixed = 0.0 if self._left >= self._seconds else min(self._rounds)", "fixed = 0.0",
        LAYERSKIP + "decoding/test_budget.py",
    ),
    Mutation(
        "pass after pass while any time is left", DECODING + "scheduler.py",
        "self._another = seconds\n", "self._another = 0.0\n", LAYERSKIP + "decoding/test_budget.py",
    ),
    Mutation(
        "a pass that took too long is tried again and again", DECODING + "scheduler.py",
        "while num_tokens > 1 and self._takes_longer", "while False and self._takes_longer",
        LAYERSKIP + "decoding/test_budget.py -k jumps",
    ),
    Mutation(
        "top-p of all tokens, not of those that top-k leaves", DECODING + "sampling.py",
        "if self.top_k is not None:\n            logits = _keep_top_k(logits, self.top_k, self.largest_k)\n"
        "        if self.top_p is not None:\n            logits = _keep_top_p(logits, self.top_p)\n",
        "if self.top_p is not None:\n            logits = _keep_top_p(logits, self.top_p)\n"
        "        if self.top_k is not None:\n            logits = _keep_top_k(logits, self.top_k, self.largest_k)\n",
        LAYERSKIP + "decoding/test_sampling.py -k share_of_what",
    ),
    Mutation(
        "a hole in a mask is taken out of a prompt", DECODING + "validation.py",
        "kept[-1] - kept[0] + 1 != len(kept)", "False", LAYERSKIP + "decoding/test_prompts.py -k holes",
    ),
    Mutation(
        "drafts behind the end of a sequence are counted", DECODING + "request.py",
        "tuple(drafts[: self.remaining])", "tuple(drafts)", LAYERSKIP + "decoding/test_records.py -k in_batches",
    ),
    Mutation(
        "what was looked up counts as drafted by a layer", DECODING + "request.py",
        "source = (self.lookup.proposal.source, None)", "source = (self.lookup.proposal.source, self.exit_layer)",
        LAYERSKIP + "decoding/test_records.py -k in_one_record",
    ),
    Mutation(
        "the draft after the last accepted one is not decided", DECODING + "outputs.py",
        "min(self.emitted, len(self.drafts))", "self.accepted", LAYERSKIP + "decoding/test_sources.py -k by_position",
    ),
    Mutation(
        "the slot that was used last goes first", DECODING + "scheduler.py",
        "key=lambda one: one.last_used", "key=lambda one: -one.last_used",
        LAYERSKIP + "decoding/test_conversation.py -k least_recently",
    ),
    Mutation(
        "a slot whose beginning is copied counts as unused", DECODING + "scheduler.py",
        "            self.touch(source)\n", "            pass\n",
        LAYERSKIP + "decoding/test_conversation.py -k counts_as_use",
    ),
    Mutation(
        "a slot holds the token that was emitted last", DECODING + "request.py",
        "self.prompt_tokens + self.new_tokens[:-1] if", "self.prompt_tokens + self.new_tokens if",
        LAYERSKIP + "decoding/test_conversation.py -k its_own_tokens_only",
    ),
    Mutation(
        "a mixed round takes the lookup drafts of the first mixed round's sequences", DECODING + "batch.py",
        "lookup_rows = [row for row, request in enumerate(self.requests) if request.lookup_drafts is not None]",
        "rows = [row for row, request in enumerate(self.requests) if request.lookup_drafts is not None]\n"
        "            lookup_rows = vars(self).setdefault('rows', rows)",
        LAYERSKIP + "decoding/test_sources.py -k change_places",
    ),
    Mutation(
        "min-p drops a token that is just probable enough", DECODING + "sampling.py",
        "logits < floor", "logits <= floor", LAYERSKIP + "decoding/test_sampling.py -k bound_of_min_p",
    ),
    Mutation(
        "top-p keeps a token more than it needs", DECODING + "sampling.py",
        "cumsum(-1) <= 1 - top_p", "cumsum(-1) < 1 - top_p", LAYERSKIP + "decoding/test_sampling.py -k bound_of_top_p",
    ),
    Mutation(
        "top-k drops a token equal to the k-th", DECODING + "sampling.py",
        "(logits < threshold)", "(logits <= threshold)", LAYERSKIP + "decoding/test_sampling.py -k transformers_do",
    ),
    Mutation(
        "what a mixed round emits is not penalized", DECODING + "spec_step.py",
        "whole.controls.put_seen(self.at, self.sequences.controls)", "pass",
        LAYERSKIP + "decoding/test_sources.py -k of_each_alone and processed",
    ),
    Mutation(
        "a proposal is judged past its first mistake", DECODING + "adaptive.py",
        "            if token != other:\n                break\n", "",
        LAYERSKIP + "decoding/test_controller.py -k first_mistake",
    ),
    Mutation(
        "the cost of a round before which draft layers read is learned", DECODING + "session.py",
        "is not DraftKind.MIXED and not launched.caught_up", "is not DraftKind.MIXED",
        LAYERSKIP + "decoding/test_exit_decoding.py -k predicted",
    ),
    Mutation(
        "who chooses does not know how far draft layers are behind", DECODING + "session.py",
        "request.acceptance.lag = request.draft_lag", "request.acceptance.lag = 0",
        LAYERSKIP + "decoding/test_exit_decoding.py -k predicted",
    ),
    Mutation(
        "a draft behind the first mistake ends a sequence", DECODING + "session.py",
        "for draft in drafts[accepted : accepted + 1]:", "for draft in drafts:",
        LAYERSKIP + "decoding/test_session.py -k state_is_not_finite",
    ),
]  # fmt: skip
