"""patch_rotary's bands in vLLM as data, and what its replacements leave to the original."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet

from ascend_patch import _explain, _records, _registry
from ascend_patch._registry import Band, Patch

PATCH = _registry.load()["rotary"]
BANDS = [band for band in PATCH.bands if band.host == "vllm"]
EDGES = ("0.10.2", "0.34.0")
BETWEEN = ("0.11.0", "0.11.2", "0.12.0", "0.13.0", "0.14.0", "0.15.1", "0.16.0", "0.20.2", "0.26.0")
FINAL = (*BETWEEN, "0.27.0", "0.29.0", "0.32.0", "0.32.1")


def covering(release: str) -> list[Band]:
    return [band for band in BANDS if SpecifierSet(band.versions).contains(release)]


@pytest.mark.parametrize("release", FINAL)
def test_each_release_has_a_full_band_and_behind_it_one_without_the_fused_form(release):
    full, rest = covering(release)
    assert full.label == ""
    assert rest.label
    assert rest.releases == full.releases
    assert full.targets[: len(rest.targets)] == rest.targets
    fused = full.targets[len(rest.targets) :]
    assert [t.symbol.rpartition(":")[2] for t in fused] == [
        "Qwen3Attention.forward",
        "Qwen3MoeAttention.forward",
    ]
    # What the fused form needs of the norms, the rest must not fail on.
    assert not any("qwen3" in s or "layernorm" in s for t in rest.targets for s in t.context)


@pytest.mark.parametrize("release", EDGES)
def test_other_releases_have_none(release):
    assert covering(release) == []


def test_every_recorded_release_is_in_the_bands_of_its_version_and_no_others():
    for release in _records.releases("vllm"):
        named = [band for band in BANDS if release in band.releases]
        assert named == covering(release)
        assert named


def test_bands_have_names_of_their_own():
    """The key of vLLM's compile cache tells two bands apart by them."""
    names = [band.name for band in PATCH.bands]
    assert len(set(names)) == len(names)


def test_tables_show_ranges_that_meet_as_one():
    def band(versions, **fields):
        return Band("vllm", versions, ("1.0",), BANDS[0].targets, **fields)

    def shown(*bands):
        return _explain.applies_to(Patch("demo", "1", "s", "w", "u", "r", bands))

    assert shown(band(">=1,<2"), band(">=1,<2", label="x"), band(">=2,<3")) == "vllm >=1,<3"
    assert shown(band(">=1,<2"), band(">=3,<4")) == "vllm >=1,<2; vllm >=3,<4"
    on = {"devices": ("cuda",)}
    assert shown(band(">=1,<2", **on), band(">=2,<3", **on)) == "vllm >=1,<3 on cuda"
    for first, second in ((on, {}), ({}, on)):
        assert ">=2,<3" in shown(band(">=1,<2", **first), band(">=2,<3", **second))
    retired = Band("vllm", ">=2,<3", retired="it is right")
    assert shown(band(">=1,<2"), retired) == "vllm >=1,<2; vllm >=2,<3 (retired)"
    assert shown(retired, band(">=3,<4")) == "vllm >=2,<3 (retired); vllm >=3,<4"


# --- what the replacements leave to the original ------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


def test_takes_what_the_kernel_s_api_covers(torch):
    from ascend_patch.impl.rotary import takes

    positions, flat = torch.arange(6), torch.zeros(6, 8)
    assert takes(positions, flat, None, 4)
    assert takes(positions, flat.view(6, 2, 4), flat.view(6, 2, 4), 4)
    # [batch, sequence, heads * head_size], which the releases flatten
    assert not takes(positions.view(2, 3), flat.view(2, 3, 8), None, 4)
    assert not takes(positions.view(2, 3), flat.view(2, 3, 8), None, 8)
    assert not takes(positions, flat.double(), None, 4)
    assert not takes(positions, flat, flat.half(), 4)
    # A device that has no kernel of ours.
    assert not takes(positions, flat.to("meta"), None, 4)


def original(*call):
    return "the original", call


def test_angles_of_other_shapes_are_the_original_s(torch):
    from ascend_patch.impl import rotary_angles as angles

    ours = angles.dispatch(original)
    x, cos = torch.zeros(2, 5, 3, 8), torch.ones(5, 4)
    assert ours(x.to("meta"), cos, cos, True)[0] == "the original"
    assert ours(x, cos, cos, True).shape == x.shape
    assert ours(x, cos.expand(2, 5, 4), cos.expand(2, 5, 4), True).shape == x.shape
    for call in (
        (x.view(2, 5, 3, 1, 8), cos, cos, True),
        (x, cos.expand(1, 5, 4), cos.expand(1, 5, 4), True),
        (x.double(), cos, cos, True),
    ):
        assert ours(*call)[0] == "the original"


@pytest.mark.parametrize("neox", [True, False])
def test_forerunners_rotate_as_complex_numbers(torch, neox, seed):
    from ascend_patch.impl import rotary_angles as angles

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 3, 8, generator=generator)
    angle = torch.randn(5, 4, generator=generator)
    pairs = x.reshape(2, 5, 3, 2, 4).transpose(3, 4) if neox else x.reshape(2, 5, 3, 4, 2)
    turned = torch.view_as_complex(pairs.double().contiguous())
    turned = torch.view_as_real(turned * torch.polar(torch.ones(5, 1, 4), angle[:, None]).cdouble())
    expected = (turned.transpose(3, 4) if neox else turned).reshape(x.shape)
    cos, sin = angle.cos(), angle.sin()
    got = angles.dispatch(original)(x, cos, sin, neox)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    vision = angles.vision_0_12(original)(x, cos, sin)
    assert torch.equal(vision, got) == neox


def test_where_vllm_has_a_kernel_for_given_angles_it_stays(torch, monkeypatch):
    from ascend_patch.impl import rotary_angles as angles

    class OnCuda:
        class device:
            type = "cuda"

    assert angles.dispatch(original)(OnCuda(), None, None, True)[0] == "the original"
    assert angles.vision_0_12(original)(OnCuda(), None, None)[0] == "the original"


def test_layers_without_sections_leave_three_rows_to_the_original(torch):
    from ascend_patch.impl import rotary_sections as by_section

    class Layer:
        head_size, mrope_section, mrope_interleaved = 4, None, False

    query = torch.zeros(6, 8)
    ours = by_section.forward(original)
    assert ours(Layer(), torch.zeros(3, 6, dtype=torch.long), query, query)[0] == "the original"
    Layer.mrope_section = [1, 1]
    assert ours(Layer(), torch.zeros(3, 6, dtype=torch.long), query, query)[0] == "the original"


def test_vllm_s_promise_of_batch_invariance_is_kept(torch, monkeypatch):
    pytest.importorskip("vllm", reason="vllm is not installed")
    from ascend_patch.impl import rotary_fused

    class Layer:
        """Anything else that the decision reads would be an AttributeError."""

    monkeypatch.setenv(rotary_fused.BATCH_INVARIANT, "1")
    assert rotary_fused.forward(original)(Layer(), None, None)[0] == "the original"
    monkeypatch.setenv(rotary_fused.BATCH_INVARIANT, "0")
    with pytest.raises(AttributeError):
        rotary_fused.forward(original)(Layer(), None, None)
