"""`explain attention_router --case`: the row and why, and a sentence for what is no case."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, fields

import pytest

from ascend_patch import _explain_case, cli
from ascend_patch.kernels.attention.case import HOST, STATES, Case
from ascend_patch.kernels.attention.route import route


def run(capsys, *words: str) -> tuple[int, str, str]:
    status = cli.main(["explain", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_row_and_why(capsys):
    case = "state=chunked,sliding_window=4096,head_size=64"
    status, out, err = run(capsys, "attention_router", "--case", case)
    assert (status, err) == (0, "")
    found = route(Case("chunked", sliding_window=4096, head_size=64))
    for text in (found.row, found.operator, found.layout, "4095 before", found.reason):
        assert text in out


def test_a_refusal_is_its_sentence(capsys):
    status, out, _ = run(capsys, "attention_router", "--case", "state=decode,soc=310P")
    assert status == 0
    assert "The system is 310P" in out
    assert "the host" in out


def test_as_json(capsys):
    words = ("Patch-Attention-Router", "--json", "--case", "state=decode,capturing=yes")
    status, out, _ = run(capsys, *words)
    case = Case("decode", capturing=True)
    assert status == 0
    assert json.loads(out) == {"case": asdict(case), "route": asdict(route(case))}
    assert route(case).operator == HOST


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "more",
    [
        "",
        "causal=false",
        "sinks=true",
        "batch=0",
        "block_size=24",
        "head_size=256,sliding_window=8",
        "sliding_window=none",
    ],
)
def test_every_route_has_a_text(state, more):
    text = _explain_case.explain_text("attention_router", f"state={state},{more}")
    assert route(_explain_case.parse(f"state={state},{more}")).row in text


def test_every_field_can_be_said():
    case = Case(
        "chunked",
        False,
        64,
        32,
        4,
        128,
        True,
        True,
        "encoder",
        "float16",
        "int8",
        64,
        9,
        2,
        77,
        3,
        True,
        True,
        "A3",
        "2.10.0",
        "9.0",
    )
    assert all(getattr(case, f.name) != f.default for f in fields(Case))
    said = ",".join(f"{f.name}={getattr(case, f.name)}" for f in fields(Case))
    assert _explain_case.parse(said) == case


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stat=decode", "no 'stat'. Did you mean `state`?"),
        ("state=prefil", "Did you mean `prefill`?"),
        ("state=decode,attn_type=encoder-only", "Did you mean `encoder_only`?"),
        ("state=decode,dtype=bf16", "bfloat16"),
        ("state=decode,sliding_window=wide", "a whole number"),
        ("state=decode,causal=perhaps", "true or false"),
        ("state=decode,batch", "batch without a value"),
        ("state=decode,state=prefill", "state twice"),
        ("head_size=64", "no state"),
        ("", "no state"),
    ],
)
def test_what_is_no_case_is_told_so(capsys, text, said):
    status, out, err = run(capsys, "attention_router", "--case", text)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_another_patch_has_no_cases(capsys):
    status, _, err = run(capsys, "rotary", "--case", "state=decode")
    assert status == 2
    assert "--case is for attention_router" in err
    status, out, _ = run(capsys, "rope", "--json", "--case", "state=decode")
    assert status == 2
    assert "no patch 'rope'" in json.loads(out)["error"]


def test_torch_is_not_imported():
    code = (
        "import sys; from ascend_patch import cli; "
        "status = cli.main(['explain', 'attention_router', '--case', 'state=decode']); "
        "sys.exit(status or 'torch' in sys.modules or 'vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "causal-cache" in done.stdout
