"""The recorded schemas: what torch accepts, what a release has, what the real wheels say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import _env  # noqa: E402
import _installer  # noqa: E402
import _op_schemas  # noqa: E402

from ascend_patch.kernels.npu_ops import schemas  # noqa: E402
from ascend_patch.kernels.npu_ops.errors import OperatorError  # noqa: E402

ENFORCED = ("2.7.1", "2.8.0.post2", "2.9.0", "2.10.0")
LIVE = """
import torch, torch_npu
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith(("npu::", "atb::")):
        print("SCHEMA", schema)
"""


def installed():
    """Folders of site-packages that hold a real torch_npu, of environments made by other tests."""
    return sorted(_env.cache_root().glob("vllm-ascend/*/venv/lib/python3*/site-packages"))


def release_of(packages):
    (folder,) = packages.glob("torch_npu-*.dist-info")
    return folder.name.removeprefix("torch_npu-").removesuffix(".dist-info")


@pytest.fixture
def real():
    found = [folder for folder in installed() if (folder / "torch_npu").is_dir()]
    if not found:
        pytest.skip("missing: a real torch_npu, which the tests in tests/ascend install")
    return found[0]


@pytest.mark.parametrize("release", schemas.releases())
def test_torch_accepts_each(release):
    for name, text in schemas.load(release).items():
        parsed = torch._C.parse_schema(text)
        assert str(parsed) == text
        overload = f".{parsed.overload_name}" if parsed.overload_name else ""
        assert parsed.name + overload == name


def test_what_changed_between_releases():
    """Facts about the operators themselves, so that a wrong cut of the data is seen."""
    for release in ENFORCED:
        assert release in schemas.releases()
    old, new = schemas.load("2.9.0"), schemas.load("2.10.0")
    assert "npu::npu_gather_pa_kv_cache" not in old
    assert "npu::npu_gather_pa_kv_cache" in new
    for name, argument in (("npu_rotary_mul", "rotate"), ("npu_mrope", "cache_mode")):
        assert argument not in old[f"npu::{name}"]
        assert argument in new[f"npu::{name}"]
    fusion = "npu::npu_fusion_attention"
    assert [("sink" in schemas.load(r)[fusion]) for r in ("2.7.1", "2.8.0", *ENFORCED[1:])] == [
        False, False, True, True, True
    ]  # fmt: skip
    rotary = "npu::npu_apply_rotary_pos_emb"
    assert 'layout="BSH"' in schemas.load("2.10.0")[rotary]
    assert 'layout="BSND"' in schemas.load("2.11.0")[rotary]
    # A post release may be newer than the next number.
    assert "npu::npu_gather_pa_kv_cache" in schemas.load("2.7.1.post4")
    assert "npu::npu_gather_pa_kv_cache" not in schemas.load("2.8.0")
    for name in ("npu::npu_fused_infer_attention_score", "atb::_npu_paged_attention"):
        assert len({schemas.load(release)[name] for release in schemas.releases()}) == 1


@pytest.mark.parametrize(
    ("asked", "taken"),
    [("2.7.1", "2.7.1"), ("2.7.1.post5", "2.7.1.post4"), ("2.9.2", "2.9.1"),
     ("2.8.0.post1", "2.8.0"), ("2.10.0.post2", "2.10.0.post2"), ("3.1", "2.14.0")],
)  # fmt: skip
def test_a_release_that_is_not_recorded_takes_the_one_before(asked, taken):
    assert schemas.nearest(asked) == taken
    assert schemas.load(asked) == schemas.load(taken)


def test_nothing_is_recorded_before_the_first():
    with pytest.raises(OperatorError, match=r"torch_npu 2\.6\.0: the oldest recorded .* 2\.7\.1"):
        schemas.load("2.6.0")


def test_the_committed_data_is_what_the_script_writes():
    """Operators, order and form: only the schemas themselves come from elsewhere."""
    found = {release: schemas.load(release) for release in schemas.releases()}
    assert _op_schemas.render(found) == schemas.PATH.read_text(encoding="utf-8")
    assert _op_schemas.releases_of(schemas.PATH) == list(schemas.releases())


def test_the_script_reads_them_out_of_a_real_wheel(real):
    """Those that lie in one piece; each other one is there block by block."""
    release = release_of(real)
    library = _op_schemas.Libraries(real / "torch_npu")
    whole = library.whole()
    recorded = schemas.load(release)
    assert len(whole) >= 20
    for name, text in whole.items():
        assert _op_schemas.canonical(name, text) == recorded[name]
    for name in set(recorded) - set(whole):
        assert library.names(name)
    for name in set(_op_schemas.OPERATORS) - set(recorded):
        assert not library.names(name)


def test_blocks_tell_a_schema_from_another(real):
    """A schema that was copied by blocks is recognised, and no other is."""
    library = _op_schemas.Libraries(real / "torch_npu")
    name = "atb::_npu_reshape_and_cache"
    right = schemas.load(release_of(real))[name].partition("::")[2]
    assert library.holds(name, right)
    for wrong in (
        right.replace("slot_indices", "slot_mapping"),
        right.replace("Tensor value,", "Tensor value, Tensor more,"),
        right.replace("-> ()", "-> Tensor"),
    ):
        assert not library.holds(name, wrong)


@pytest.mark.slow
def test_a_real_torch_npu_registers_them(real):
    """The same release, imported over stubs of CANN: the live schemas."""
    folder = real.parents[3]
    python, stubs = folder / "venv/bin/python", folder / "stubs"
    if not stubs.is_dir():
        pytest.skip("missing: stubs of CANN, which the tests in tests/ascend build")
    done = subprocess.run(
        [str(python), "-c", LIVE],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "LD_LIBRARY_PATH": str(stubs),
            "PYTHONPATH": str(folder / "acl"),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    live = {line.removeprefix("SCHEMA ") for line in done.stdout.splitlines() if "SCHEMA" in line}
    assert len(live) > 400, done.stderr[-2000:]
    assert set(schemas.load(release_of(real)).values()) <= live


@pytest.mark.slow
def test_a_wheel_of_an_enforced_release(tmp_path):
    """The 2.9.0 of the index has every one of them in one piece."""
    _installer.install_folder(
        tmp_path, "torch-npu==2.9.0", _env.cache_root(), python=Path(sys.executable)
    )
    found, notes = _op_schemas.read({"2.9.0": tmp_path / "torch_npu"})
    assert not notes
    assert found["2.9.0"] == schemas.load("2.9.0")
