"""The documented limits of the lists of lengths of fused inference attention."""

from __future__ import annotations

from collections.abc import Sequence

from ascend_patch.kernels.npu_ops.fused_infer_problem import Problem

_MOST_REQUESTS = 4096


def check(problem: Problem) -> None:
    """Raise OperatorError for the first list that does not fit the call."""
    if problem.ragged:
        _check_ragged(problem)
        return
    batch = problem.query.shape[0]
    if problem.query_lens and not problem.single:
        name, rows = problem.query_lens_name, problem.query_rows
        _check_plain(problem, name, problem.query_lens, batch, rows, f"Q_S of {rows}")
    if problem.kv_lens:
        if problem.block_table is not None:
            entries = problem.block_table.shape[-1]
            columns = entries * problem.block_size
            room = f"{entries} entries of the block table times block_size={problem.block_size}"
        else:
            columns = problem.key.shape[problem.letters.index("S")]
            room = f"KV_S of {columns}"
        _check_plain(problem, problem.kv_lens_name, problem.kv_lens, batch, columns, room)


def _check_plain(
    problem: Problem, name: str, lens: Sequence[int], batch: int, most: int, room: str
) -> None:
    if len(lens) != 1 and len(lens) < batch:
        raise problem.error(
            f"{name} has {len(lens)} entries for a batch of {batch}; "
            "it must have one, or one for each request"
        )
    for index, length in enumerate(lens[:batch]):
        if not 0 <= length <= most:
            raise problem.error(
                f"{name} has {length} at place {index}; it must be between 0 and the {room}"
            )


def _check_ragged(problem: Problem) -> None:
    ends, kv = problem.query_lens, problem.kv_lens
    layout = problem.layout
    for name, lens in ((problem.query_lens_name, ends), (problem.kv_lens_name, kv)):
        if not lens:
            raise problem.error(f"{name} is missing; input_layout={layout!r} needs it")
        if len(lens) > _MOST_REQUESTS:
            raise problem.error(
                f"{name} has {len(lens)} entries; {layout} takes {_MOST_REQUESTS} at most"
            )
    assert ends is not None and kv is not None  # noqa: PT018  said above
    _check_cumulative(problem, problem.query_lens_name, ends)
    if len(kv) != len(ends):
        # Error 561002 of an NPU.
        raise problem.error(
            f"{problem.kv_lens_name} has {len(kv)} entries for a batch of {len(ends)}; "
            f"it must have one for each entry of {problem.query_lens_name}"
        )
    # CANN's, as is the same of the keys: padded tokens must be cut off or counted.
    if ends[-1] != problem.query_rows:
        raise problem.error(
            f"{problem.query_lens_name} ends with {ends[-1]} and query has {problem.query_rows} "
            "tokens; they must be the same"
        )
    if problem.paged:
        for index, length in enumerate(kv):
            if length < 0:
                raise problem.error(
                    f"{problem.kv_lens_name} has {length} at place {index}; with a block table "
                    "it is the length of each request"
                )
        return
    _check_cumulative(problem, problem.kv_lens_name, kv)
    tokens = problem.key.shape[problem.letters.index("T")]
    if kv[-1] != tokens:
        raise problem.error(
            f"{problem.kv_lens_name} ends with {kv[-1]} and key has {tokens} tokens; without a "
            "block table they must be the same"
        )


def _check_cumulative(problem: Problem, name: str, lens: Sequence[int]) -> None:
    before = 0
    for index, end in enumerate(lens):
        if end < before:
            raise problem.error(
                f"{name} has {end} at place {index} after {before}; in {problem.layout} it is "
                "cumulative: each entry is the end of a request"
            )
        before = end
