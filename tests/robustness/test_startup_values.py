"""Any value of any variable: it works as documented, or is an error that names the variable."""

from __future__ import annotations

import os
import random
import string

from tally import tally

from ascend_patch import _devices, _env, _registry, _selection, _settings, _verify

KNOWN = ("rotary", "attention_router", "gdn_attn", "kv_connector")
IN_ALL = ("rotary", "gdn_attn", "kv_connector")
VARIABLES = _env.REMEMBERED
WORDS = (
    *("1", "true", "yes", "on", "0", "false", "no", "off", "none", "auto", "npu", "cpu", "cuda"),
    *KNOWN,
    *(
        "all",
        "-all",
        "-",
        "patch_rotary",
        "rotary:3",
        "all:1",
        "rotary:0",
        "emulated",
        "2",
        "maybe",
    ),
)
PIECES = (
    ",",
    " ",
    "\t",
    "-",
    ":",
    "=",
    "\n",
    "\x1b[31m",
    "\u2028",
    "\xa0",
    "é",
    "\U0001f642",
    "%s",
)


def draw(chance: random.Random) -> str:
    """A value as an environment may hold it: no NUL, and bytes that are no UTF-8 as surrogates."""
    kind = chance.randrange(6)
    if kind == 0:
        word = chance.choice(WORDS)
        cased = "".join(chance.choice((c.lower(), c.upper())) for c in word)
        return chance.choice(("", " ", "\t ")) + cased + chance.choice(("", " ", "\n"))
    if kind == 1:
        return ",".join(chance.choices(WORDS, k=chance.randrange(6)))
    if kind == 2:
        return "".join(chance.choices((*WORDS, *PIECES), k=chance.randrange(8)))
    if kind == 3:
        return "".join(chance.choices(string.printable, k=chance.randrange(30)))
    if kind == 4:
        data = bytes(chance.randrange(1, 256) for _ in range(chance.randrange(20)))
        return os.fsdecode(data)
    return chance.choice(WORDS) * chance.randrange(1, 3000)


def documented(name: str, value: str) -> object:
    """What the value means, read a second time from what the documents say; None is an error."""
    text = value.strip().lower()
    entries = [entry.strip().lower() for entry in value.split(",") if entry.strip()]
    if name in _env.SWITCHES:
        if not text:
            return "default"
        return {"1": True, "true": True, "yes": True, "on": True}.get(
            text, False if text in ("0", "false", "no", "off") else None
        )
    if name == _env.DEVICE:
        return (text or "auto") if text in ("", *_devices.DEVICES) else None
    if text in ("", "0", "false", "no", "off", "none"):
        return ()
    if name == _env.PATCHES:
        return selected(entries)
    return compared(entries)


def patch_id(text: str) -> str:
    return text.strip().replace("-", "_").removeprefix("patch_")


def selected(entries: list[str]) -> tuple[str, ...] | None:
    named = {patch_id(e) for e in entries if not e.startswith("-")}
    left_out = {patch_id(e[1:]) for e in entries if e.startswith("-")}
    if not entries or named - {*KNOWN, "all"} or left_out - {*KNOWN}:
        return None
    wanted = named - {"all"} | (set(IN_ALL) if "all" in named or not named else set())
    return tuple(name for name in KNOWN if name in wanted - left_out)


def compared(entries: list[str]) -> tuple[str, ...] | None:
    found = set()
    for entry in entries:
        name, colon, count = entry.partition(":")
        right = count.strip().isascii() and count.strip().isdigit()
        if patch_id(name) not in {*KNOWN, "all"} or (colon and not (right and int(count) > 0)):
            return None
        found.add(patch_id(name))
    if not entries:
        return None
    return tuple(name for name in KNOWN if name in found or "all" in found)


def read(name: str, value: str) -> object:
    """What the shim's own readers make of it."""
    if name in _env.SWITCHES:
        off, on = _env.switch(name, False), _env.switch(name, True)
        return off if off == on else "default"
    if name == _env.DEVICE:
        device, reason = _devices.choose({name: value}, {}, {})
        return device if reason == f"{name}={device}" else "auto"
    if name == _env.PATCHES:
        return _selection.parse(value, KNOWN, IN_ALL).ids
    return tuple(name for name in KNOWN if name in _verify.parse(value, KNOWN, KNOWN).calls)


def test_two_thousand_values_of_all_variables(seed, monkeypatch):
    chance = random.Random(seed)
    errors = dict.fromkeys(VARIABLES, 0)
    for _ in range(2000):
        name, value = chance.choice(VARIABLES), draw(chance)
        monkeypatch.setenv(name, value)
        sentence, found = "", None
        try:
            found = read(name, value)
        except _env.SettingError as error:
            sentence = str(error)
        monkeypatch.delenv(name)
        assert found == documented(name, value), (name, value)
        assert (found is None) == bool(sentence), (name, value)
        if sentence:
            errors[name] += 1
            assert sentence.startswith(f"{name}="), (name, value)
            assert sentence.isprintable(), (name, value)
    assert all(errors.values()), f"a variable had no value that is an error: {errors}"
    tally(
        "values of the ASCEND_PATCHES variables, through their readers",
        tried=2000,
        unit="values",
        seed=seed,
        note=f"{sum(errors.values())} were errors that name the variable",
    )


def test_a_sample_of_values_in_processes_of_their_own(host, seed):
    host.patches('patch("rotary", target("vllm.ops:f")), patch("gdn_attn", target("vllm.more:g"))')
    chance = random.Random(seed)
    tried, stopped = 15, 0
    for _ in range(tried):
        name, value = chance.choice(VARIABLES), draw(chance)
        variables = {"ASCEND_PATCHES": "all", name: value}
        found = host.run("import vllm\nprint('it started')", fails=True, **variables)
        assert "Traceback" not in found.err, (name, value)
        if found.code == 0:
            assert found.out == "it started\n", (name, value)
            assert "failed" not in found.err, (name, value, found.err)
            continue
        stopped += 1
        assert (found.code, found.out) == (1, ""), (name, value)
        (line,) = found.err.splitlines()
        assert line.startswith(f"ascend-patch: {name}="), (name, value)
        plain = host.run("print('fine')", **variables)
        assert (plain.out, plain.err) == ("fine\n", ""), (name, value)
    assert stopped, "no value was an error"
    tally(
        "values of the ASCEND_PATCHES variables, in processes that import a host",
        tried=tried,
        unit="processes",
        seed=seed,
        note=f"{stopped} stopped with one sentence, the others started",
    )


def test_everything_is_read_before_vllm_runs():
    """The control of the fuzzers: with nothing set everything is its default."""
    found = _settings.read(_registry.load())
    assert found.selection.ids == ()
    assert found.tests_at_load is (found.installed.device == "npu")
