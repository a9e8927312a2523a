"""patch_attention_router on host vllm: the emulated device alone, and what it is elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from ascend_patch import _devices, _explain, _plan, _records, _registry, _versions
from ascend_patch._versions import Installed

PATCH = _registry.load()["attention_router"]
BANDS = [band for band in PATCH.bands if band.host == "vllm"]
DEVICES = (*(name for name in _devices.DEVICES if name != "auto"), *_devices.OTHER_DEVICES)


@pytest.fixture
def decide(monkeypatch, tmp_path):
    """What the patch does where a release's source is exactly as recorded."""

    def decide(version: str, device: str, release: str = "0.18.0") -> _plan.Decision:
        match = _records.Match((release,), release, ())
        monkeypatch.setattr(_records, "match", lambda host, root, symbols, releases: match)
        installed = Installed({"vllm": version}, {"vllm": Path(tmp_path)}, "vllm", device=device)
        return _plan.decide(PATCH, installed)

    return decide


def test_every_device_has_a_band():
    named = [device for band in BANDS for device in band.devices]
    assert sorted(named) == sorted(DEVICES)


@pytest.mark.parametrize("name", list(_registry.load()))
def test_bands_name_devices_that_there_are(name):
    for band in _registry.load()[name].bands:
        assert set(band.devices) <= set(DEVICES)


def test_0_18_0_on_the_emulated_device_is_armed(decide):
    found = decide("0.18.0", "emulated")
    assert found.state == "armed"
    assert [t.symbol for t in found.band.targets] == [
        "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls"
    ]


@pytest.mark.parametrize("version", ["0.11.0", "0.17.1", "0.18.1", "0.32.0"])
def test_other_releases_on_the_emulated_device_say_which_one_it_is_for(decide, version):
    found = decide(version, "emulated")
    assert found.state == "skipped"
    assert f"vllm {version} on emulated is outside of the releases" in found.reason
    assert found.reason.endswith("(==0.18.0)")


@pytest.mark.parametrize("device", ["npu", "cuda", "cpu"])
@pytest.mark.parametrize("version", [*_records.releases("vllm"), "0.40.0.dev7+g1", "unknown"])
def test_elsewhere_vllm_is_right_and_strict_has_nothing_to_refuse(decide, version, device):
    found = decide(version, device)
    assert found.state == "retired"
    assert "ASCEND_PATCHES_DEVICE=emulated" in found.reason


def test_all_includes_it():
    assert PATCH.available


@pytest.mark.parametrize(
    ("device", "states"),
    [("emulated", ["armed", "skipped"]), ("cpu", ["skipped", "retired"])],
)
def test_explain_tells_each_band_by_its_device(monkeypatch, tmp_path, device, states):
    match = _records.Match(("0.18.0",), "0.18.0", ())
    monkeypatch.setattr(_records, "match", lambda host, root, symbols, releases: match)
    installed = Installed(
        {"vllm": "0.18.0"}, {"vllm": tmp_path}, "vllm", device=device, device_reason="it was asked"
    )
    monkeypatch.setattr(_versions, "find", lambda: installed)
    found = _explain.explain("attention_router")["bands"]
    bands = [band for band in found if band["name"].startswith("vllm ")]
    assert [band["state"] for band in bands] == states
    other = bands[states.index("skipped")]
    assert other["reason"] == f"the device is {device}: it was asked"
    assert not other["in_question"]
    assert "vllm ==0.18.0 on emulated" in _explain.explain_text("attention_router")
