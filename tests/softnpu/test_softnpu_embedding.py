"""vllm-ascend 0.13.0 serves embeddings with prefix caching: wrong without the shim, right with it.

The fault that patch `attention_router` is for: a pooling model's prompt that hits the prefix cache
is read by an attention that does not look into the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from _system import SetupError
from softnpu_environment import Environment
from softnpu_servers import calls, server, started, tiny_model

SHORT = ("The people know how to make", "water is long and", "I")
# Some 300 tokens: the second begins with two whole blocks of the first, which are in the cache.
LONG = "the people of the water and the day that was long for one and two when they made " * 16
TEXTS = (LONG, LONG + "two", *SHORT)
ARGUMENTS = ("--runner", "pooling", "--enable-prefix-caching", "--enable-chunked-prefill")
# Of vectors of length 1, in bfloat16; transformers in bfloat16 is as far from float32.
LIMIT = 1e-2
WRONG = 5e-2


@pytest.fixture(scope="module")
def npu_0_13() -> Environment:
    try:
        return Environment("0.13.0").prepare()
    except SetupError as error:
        pytest.skip(f"missing: {error}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("softnpu-0.13.0")


@pytest.fixture(scope="module")
def distances(npu_0_13, folder) -> Iterator[dict[str, list[list[float]]]]:
    """For each server the largest error of each text's vector, at the first turn and the second."""
    model = tiny_model(npu_0_13)
    right = transformers_vectors(model)
    servers = {
        "unpatched": server(npu_0_13, model, folder / "unpatched", *ARGUMENTS),
        "patched": server(npu_0_13, model, folder / "patched", *ARGUMENTS, patches="all"),
    }
    with started(servers):
        found = {}
        for name, one in servers.items():
            turns = [[embedding(one, text) for text in TEXTS] for _ in range(2)]
            found[name] = [
                [
                    max(abs(a - b) for a, b in zip(vector, wanted, strict=True))
                    for vector, wanted in zip(turn, right, strict=True)
                ]
                for turn in turns
            ]
            print(name, [[f"{error:.1e}" for error in turn] for turn in found[name]])
        yield found


def embedding(one, text: str) -> list[float]:
    answer = one.post("/v1/embeddings", {"model": "model", "input": text})
    return answer["data"][0]["embedding"]


def transformers_vectors(model) -> list[list[float]]:
    """The last token's hidden state, normalized, in float32 and in one piece."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    network = AutoModel.from_pretrained(str(model), dtype=torch.float32).eval()
    rows = []
    with torch.inference_mode():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            last = network(input_ids=ids).last_hidden_state[0, -1]
            rows.append(torch.nn.functional.normalize(last, dim=0).tolist())
    return rows


def test_without_the_shim_a_hit_of_the_prefix_cache_is_wrong(distances):
    first, again = distances["unpatched"]
    # At the first turn the second long text hits what the first has left, then both hit.
    assert first[0] < LIMIT
    assert first[1] > WRONG
    assert min(again[:2]) > WRONG
    # The control: what hits nothing is right.
    assert max(first[2:] + again[2:]) < LIMIT


def test_with_the_shim_every_embedding_is_right(distances):
    for turn in distances["patched"]:
        assert max(turn) < LIMIT


def test_the_patch_that_did_it_ran(distances, npu_0_13, folder):
    assert calls(npu_0_13, folder / "patched")["attention_router"] > 0
