"""The cache, rotary and norm operators through `torch.ops`, under each release's schema."""

from __future__ import annotations

import inspect

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.npu_ops import cache, norms, rotary, schemas, surface  # noqa: E402

RELEASES = ("2.7.1", "2.8.0.post2", "2.9.0", "2.10.0")
KERNELS = {**cache.KERNELS, **rotary.KERNELS, **norms.KERNELS}
# Not among the recorded ones: nobody that we patch calls it. The real torch_npu has it.
UNRECORDED = {"atb::_npu_reshape_and_cache_siso"}


@pytest.fixture(params=RELEASES)
def installed(request):
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        pytest.skip("torch_npu is loaded here: its schemas are those of one release")
    found = surface.install(request.param, record=True)
    yield found
    found.remove()


def half(*shape):
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).half() / 64


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


HEADS, ANGLES = half(1, 5, 2, 64), half(1, 5, 1, 64)
CACHES = {"key_cache": half(4, 16, 2, 16), "value_cache": half(4, 16, 2, 16)}
ROWS = {"key": half(3, 2, 16), "value": half(3, 2, 16)}
CALLS = {
    "atb::_npu_reshape_and_cache": {**ROWS, **CACHES, "slot_indices": ints(9, -1, 17)},
    "npu::npu_scatter_pa_kv_cache": {
        **ROWS, "key_cache": half(4, 2, 16, 16), "value_cache": half(4, 2, 16, 16),
        "slot_mapping": ints(9, 1, 17),
    },
    "npu::npu_gather_pa_kv_cache": {
        **CACHES, "block_tables": ints([2, 1]), "seq_lens": ints(3), **ROWS,
        "seq_offset": ints(16), "is_seq_lens_cumsum": False,
    },
    "atb::npu_paged_cache_load": {
        **CACHES, "block_table": ints([2, 1]), "context_lens": ints(3), "seq_starts": ints(16),
        "cumsum": False,
    },
    "atb::npu_paged_cache_load.out": {
        **CACHES, "block_table": ints([2, 1]), "context_lens": ints(3), "seq_starts": ints(16),
        "cumsum": False, **ROWS,
    },
    "npu::npu_rotary_mul": {"input": HEADS, "r1": ANGLES, "r2": ANGLES, "rotary_mode": "half"},
    "npu::npu_apply_rotary_pos_emb": {
        "query": HEADS, "key": HEADS.clone(), "cos": ANGLES, "sin": ANGLES, "rotary_mode": "half",
    },
    "npu::npu_mrope": {
        "positions": torch.arange(5), "query": half(5, 128), "key": half(5, 64),
        "cos_sin_cache": half(9, 64), "head_size": 64, "mrope_section": [0, 0, 0],
        "rotary_mode": "half",
    },
    "atb::_npu_rotary_embedding": {
        "positions": torch.arange(5), "query": half(5, 128), "key": half(5, 64), "head_size": 64,
        "cos_sin_cache": half(9, 64), "is_neox_style": True,
    },
    "npu::npu_rms_norm": {"input": HEADS, "gamma": half(64), "epsilon": 1e-5},
    "npu::npu_gemma_rms_norm": {"input": HEADS, "gamma": half(64), "epsilon": 1e-5},
    "npu::npu_add_rms_norm": {"x1": HEADS, "x2": HEADS, "gamma": half(64), "epsilon": 1e-5},
    "npu::npu_add_rms_norm_v2": {
        "x1": HEADS, "x2": HEADS.clone(), "gamma": half(64), "epsilon": 1e-5
    },
}  # fmt: skip


def test_each_has_a_call_here():
    assert set(CALLS) == set(KERNELS) - UNRECORDED


@pytest.mark.parametrize("name", CALLS)
def test_the_schemas_names_and_defaults_are_the_functions(name, installed):
    if name not in schemas.load(installed.release):
        assert name not in installed.names
        # Absent in old releases only.
        assert installed.release != "2.10.0"
        return
    namespace, _, rest = name.partition("::")
    operator, _, overload = rest.partition(".")
    entry = getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default")
    arguments = {a.name: a for a in entry._schema.arguments}
    parameters = inspect.signature(KERNELS[name]).parameters
    assert set(arguments) <= set(parameters), "an argument that the function does not know"
    assert set(CALLS[name]) <= set(arguments)
    for argument in arguments.values():
        # The layout's default is spelt BSH before 2.11.
        if argument.has_default_value() and argument.name != "layout":
            assert parameters[argument.name].default == argument.default_value, argument.name
    given, direct = ({n: _copy(x) for n, x in CALLS[name].items()} for _ in range(2))
    found = entry(**given)
    expected = KERNELS[name](**direct)
    for a, b in zip(_results(found), _results(expected), strict=True):
        assert torch.equal(a, b)
    for argument, value in given.items():
        if torch.is_tensor(value):
            assert torch.equal(value, direct[argument]), argument
    changed = {
        n for n, x in given.items() if torch.is_tensor(x) and not torch.equal(x, CALLS[name][n])
    }
    declared = {a.name for a in arguments.values() if a.alias_info and a.alias_info.is_write}
    # The one whose schema does not say what its documentation does.
    hidden = {"query", "key"} if operator == "npu_apply_rotary_pos_emb" else set()
    assert changed == declared | hidden
    assert [call.operator for call in installed.calls] == [name]
    installed.calls.clear()


def _copy(x):
    return x.clone() if torch.is_tensor(x) else x


def _results(found):
    return () if found is None else found if isinstance(found, tuple) else (found,)
