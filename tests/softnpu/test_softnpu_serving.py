"""vllm-ascend 0.18.0 as an OpenAI server on the software NPU, held to transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import _env
import pytest
from logprobs import LONG_PROMPTS, PROMPTS
from softnpu_servers import Answer, Reference, ask, calls, server, started, tiny_model

# Short and long; the last is longer than ten blocks of the cache, and is asked twice so that
# the second time hits the prefix cache.
TEXTS = (*PROMPTS[:4], PROMPTS[8], LONG_PROMPTS[0], LONG_PROMPTS[0])
DEFECTS = ("wrong_scale", "zeros")


@pytest.fixture(scope="module")
def model(npu):
    return tiny_model(npu)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("softnpu")


@pytest.fixture(scope="module")
def answers(npu, model, folder) -> Iterator[dict[str, tuple[Answer, ...]]]:
    """What the server without patches, the one with them, and a faulty one say."""
    servers = {
        "unpatched": server(npu, model, folder / "unpatched"),
        "patched": server(npu, model, folder / "patched", patches="all"),
    }
    with started(servers):
        yield {name: ask(one, TEXTS) for name, one in servers.items()}


@pytest.fixture(scope="module")
def references(model):
    return Reference(model, "float32"), Reference(model, "bfloat16")


def test_a_model_is_made_where_there_is_none(npu, tmp_path, monkeypatch):
    """Its weights are drawn in a process that has torch_npu and no NPU, as on a fresh machine."""
    monkeypatch.setattr(_env, "cache_root", lambda: tmp_path)
    made = tiny_model(npu)
    assert tmp_path in made.parents
    assert (made / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("name", ["unpatched", "patched"])
def test_log_probabilities_are_those_of_transformers(answers, references, name):
    """As near to float32 as transformers in bfloat16 is, which rounds at as many places."""
    exact, rounded = references
    said = answers[name]
    found, noise = exact.distance(said), exact.distance_of(rounded, said)
    print(f"{name}: {found} from float32; transformers in bfloat16: {noise}")
    assert found.root_mean_square <= 1.25 * noise.root_mean_square
    assert found.worst <= 2 * noise.worst


def test_the_patches_are_applied_and_run(answers, npu, folder):
    found = calls(npu, folder / "patched")
    assert found["attention_router"] > 0
    assert found["rotary"] > 0
    assert {"gdn_attn", "kv_connector"} <= found.keys()


def test_patched_and_unpatched_say_the_same(answers):
    same = [
        one.tokens == other.tokens
        for one, other in zip(answers["unpatched"], answers["patched"], strict=True)
    ]
    # bfloat16 may decide a near tie either way.
    assert sum(same) >= len(same) - 2, same


# What is added to a server's arguments, and the variables that it needs.
FORMS = {
    "FULL_DECODE_ONLY": ("FULL_DECODE_ONLY", 1),
    "PIECEWISE": ("PIECEWISE", 1),
    "TP 2": (None, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("patches", ["", "all"], ids=["unpatched", "patched"])
def test_graphs_and_two_ranks_say_the_same(npu, model, folder, references, form, patches):
    graphs, ranks = FORMS[form]
    name = f"{form}-{patches or 'unpatched'}".replace(" ", "-")
    arguments = ["--tensor-parallel-size", str(ranks)]
    if graphs:
        sizes = {"cudagraph_mode": graphs, "cudagraph_capture_sizes": [1, 2, 4]}
        # Later options win; the fused operator of the default needs Triton, which is off here.
        arguments += ["--no-enforce-eager", "--compilation-config", json.dumps(sizes)]
        options = {"enable_npugraph_ex": False, "fuse_qknorm_rope": False}
        more = {"ascend_compilation_config": options}
        arguments += ["--additional-config", json.dumps(more)]
    one = server(npu, model, folder / name, *arguments, patches=patches, devices=ranks)
    with started({name: one}):
        said = ask(one, TEXTS)
    log = (folder / name / "log.txt").read_text(errors="replace")
    assert ("Replaying aclgraph" in log) == bool(graphs)
    exact, rounded = references
    found, noise = exact.distance(said), exact.distance_of(rounded, said)
    print(f"{name}: {found} from float32; transformers in bfloat16: {noise}")
    assert found.root_mean_square <= 1.25 * noise.root_mean_square
    if patches:
        assert calls(npu, folder / name)["attention_router"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_far_from_transformers(npu, model, folder, references, defect):
    """The control: a norm that is 2 % off, and a stub that returns zeros."""
    exact, rounded = references
    faulty = server(npu, model, folder / defect, SOFTNPU_DEFECT=defect)
    with started({defect: faulty}):
        said = ask(faulty, TEXTS)
    found, noise = exact.distance(said), exact.distance_of(rounded, said)
    print(f"{defect}: {found} from float32; transformers in bfloat16: {noise}")
    assert found.root_mean_square > 1.25 * noise.root_mean_square
