"""One call of rotary_embedding, judged by the fp64 oracle; for every device and interpreter."""

from __future__ import annotations

import rope_oracle as oracle
import torch

from ascend_patch.kernels import rope
from ascend_patch.kernels.rope import cases


def run_and_judge(case: cases.RopeCase, seed: int, device: str = "cpu") -> None:
    """Raise AssertionError if either form is wrong, or touches what it must not."""
    call = positions, query, key, cache = cases.make_inputs(case, seed, device)
    before = query.clone(), None if key is None else key.clone()
    got_query, got_key = rope.rotary_embedding(*call, **case.options)

    phase = oracle.phases(positions, cache, case.mrope_section, case.mrope_interleaved)
    for got, x, original in ((got_query, query, before[0]), (got_key, key, before[1])):
        if x is None:
            assert got is None
            continue
        assert torch.equal(x, original), "the functional form changed its input"
        assert got.dtype == x.dtype
        assert got.shape == x.shape
        assert got.is_contiguous()
        oracle.assert_close(got, oracle.rotate(x, phase, case.head_size, case.is_neox_style))
        heads = (x.shape[0], x.shape[1] // case.head_size, case.head_size)
        passed, untouched = (t.reshape(heads)[..., case.rotary_dim :] for t in (got, x))
        assert torch.equal(passed, untouched), "elements past rotary_dim changed"

    # The value slice of qkv lies right behind the key: nothing may spill into it.
    behind = None if query._base is None else query._base[:, query.shape[1] :]
    kept = None
    if behind is not None and key is not None:
        behind = behind[:, key.shape[1] :]
        kept = behind.clone()
    assert rope.rotary_embedding_(*call, **case.options) is None
    assert torch.equal(query, got_query), "in place differs from functional"
    assert key is None or torch.equal(key, got_key), "in place differs from functional"
    assert kept is None or torch.equal(behind, kept), "wrote past the slices"
