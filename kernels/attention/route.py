"""``route``: a case to the row of the table that computes it right."""

from __future__ import annotations

from ascend_patch.kernels.attention import table
from ascend_patch.kernels.attention.case import HOST, NOTHING, Case, Route
from ascend_patch.kernels.attention.refusals import REFUSALS

# Steps differ in their lengths, so a server makes new cases for ever; they are forgotten at once.
_MOST_REMEMBERED = 4096
_remembered: dict[Case, Route] = {}


def route(case: Case) -> Route:
    """The operator and the arguments that answer ``case``; HOST with a reason where none does."""
    found = _remembered.get(case)
    if found is None:
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        found = _remembered[case] = _decide(case)
    return found


def _decide(case: Case) -> Route:
    for refusal in REFUSALS:
        if refusal.when(case):
            return Route(refusal.name, HOST, reason=refusal.sentence(case))
    if case.batch == 0 or case.max_query_len == 0:
        return Route("nothing", NOTHING, reason="there is no query, so there is nothing to compute")
    has = table.features(case)
    row = next(row for row in table.ROWS if all(has[name] == row.when[name] for name in row.when))
    tnd = row.layout == "TND"
    copied = row.cache == "paged" and not table.is_pageable(
        case.block_size, tnd=tnd, head_size=case.head_size
    )
    tokens = {"all": None, "own": 0, "window": (case.sliding_window or 0) - 1}
    reason = row.reason
    if case.sliding_window is not None and not has["window"]:
        reason += "; no request is longer than the window, which hides nothing"
    return Route(
        row.name,
        row.operator,
        layout=row.layout,
        sparse_mode=row.sparse_mode,
        mask=row.mask,
        pre_tokens=tokens[row.before],
        next_tokens=tokens[row.behind],
        query_lens=row.query_lens,
        kv_lens=row.kv_lens,
        cache="copied" if copied else row.cache,
        per_request=row.per_request,
        workspace="the operator's own",
        reason=reason,
    )
