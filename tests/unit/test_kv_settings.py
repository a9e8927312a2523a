"""Users' settings of a pull: what is read, and what is refused with a sentence."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from ascend_patch.impl import kv_settings, kv_vllm


def read(extra: Any) -> kv_settings.Settings:
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    return kv_settings.read(SimpleNamespace(kv_transfer_config=transfer), "engine-7", 60)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("{}", (2, 60.0)),
        ('{"pull_retries": 0, "pull_timeout_s": 3}', (0, 3.0)),
        ('{"pull_timeout_s": 0.25, "mooncake_protocol": "tcp"}', (2, 0.25)),
    ],
)
def test_numbers_that_make_sense_are_taken(given, found) -> None:
    settings = read(json.loads(given))
    assert settings == (*found, kv_settings.DEFAULT_QUARANTINE)
    assert type(settings.timeout) is float


@pytest.mark.parametrize("value", ["-1", "2.0", '"2"', "true", "null", "[]", "NaN"])
def test_other_retries_are_refused(value) -> None:
    wanted = r"^pull_retries in kv_connector_extra_config of engine-7 is .*; give a whole number"
    with pytest.raises(ValueError, match=wanted):
        read(json.loads(f'{{"pull_retries": {value}}}'))


@pytest.mark.parametrize(
    "value",
    ["0", "-0.5", '"60"', '"60s"', "true", "null", "{}", "NaN", "Infinity", "-Infinity"],
)
def test_other_seconds_are_refused(value) -> None:
    wanted = r"^pull_timeout_s in kv_connector_extra_config of engine-7 is .*; give a number of"
    with pytest.raises(ValueError, match=wanted):
        read(json.loads(f'{{"pull_timeout_s": {value}}}'))


def test_seconds_that_no_float_holds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pull_timeout_s .* is 'too large'; give fewer seconds"):
        read({"pull_timeout_s": 10**400})


@pytest.mark.parametrize("extra", [{}, None])
def test_nothing_set_is_the_default(extra) -> None:
    assert read(extra) == (kv_settings.DEFAULT_RETRIES, 60.0, 0.25)
    assert kv_settings.read(SimpleNamespace(kv_transfer_config=None), "e", 480) == (2, 480.0, 0.25)


@pytest.mark.parametrize("value", ["0", "-0.5", "1.01", '"0.5"', "true", "null", "NaN"])
def test_other_shares_are_refused(value) -> None:
    wanted = r"^quarantine_share in kv_connector_extra_config of engine-7 is .*; give a number abo"
    with pytest.raises(ValueError, match=wanted):
        read(json.loads(f'{{"quarantine_share": {value}}}'))
    assert read({"quarantine_share": 1}).quarantine == 1.0


def test_a_server_reads_them_before_its_host_begins(monkeypatch) -> None:
    envs = pytest.importorskip("vllm.envs", reason="vLLM is not installed here")
    monkeypatch.setattr(envs, "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", 7, raising=False)
    transfer = SimpleNamespace(kv_connector_extra_config={})
    config = SimpleNamespace(kv_transfer_config=transfer)
    assert kv_vllm._settings(config, engine_id="e") == (2, 7.0, 0.25)
    transfer.kv_connector_extra_config["pull_retries"] = -1
    with pytest.raises(ValueError, match="pull_retries"):
        kv_vllm.worker_init(pytest.fail, SimpleNamespace(), (config, "e"), {})
