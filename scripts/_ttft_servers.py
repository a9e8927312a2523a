"""The servers of scripts/bench kv ttft: how they start, and whether what they say is right."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _disaggregated
import _env
import _server
import _ttft_model
from _disaggregated import Pair, Sizes
from _server import ServerError

NHD_BLOCK = 128  # of the emulated device
STEPS = 8
ASK_SECONDS = 60
HITS = "vllm:external_prefix_cache_hits_total"
SPOKEN = range(3, 300)  # behind the special tokens


def block_of(layout: str) -> int:
    """Tokens of a block."""
    return NHD_BLOCK if layout == "NHD" else _ttft_model.BLOCK


def make_pair(
    env: _env.Environment, sizes: Sizes, layout: str, folder: Path, patched: bool
) -> Pair:
    """A pair, not started; unpatched, its servers never see the shim."""
    engine = _disaggregated.engine_folder(env.plain)
    variables = _server.inherited() | _server.base_variables()
    variables |= {
        "LD_PRELOAD": env.preload,
        "PATH": f"{env.plain.parent}:{variables.get('PATH', '')}",
        "PYTHONPATH": str(engine),
        "VLLM_CACHE_ROOT": str(_env.cache_root() / "bench-vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(_env.cache_root() / "inductor"),
    }
    if patched:
        variables |= {
            # No other patch, so that a patched server computes as an unpatched one does.
            "ASCEND_PATCHES": "kv_connector" + ",attention_router" * (layout == "NHD"),
            "ASCEND_PATCHES_DEVICE": "cpu" if layout == "HND" else "emulated",
            "ASCEND_PATCHES_STATUS_DIR": str(folder / "status"),
        }
    words = ["--dtype", _ttft_model.DTYPE, "--enforce-eager", "--block-size", str(block_of(layout))]
    words += ["--max-model-len", "2304", "--max-num-batched-tokens", "2304"]
    return _disaggregated.make_pair(
        env.python if patched else env.plain,
        str(model(env)),
        sizes,
        env=variables,
        folder=folder,
        arguments=[*words, "--no-enable-prefix-caching"],
    )


def model(env: _env.Environment) -> Path:
    """The model's folder; made when it is first needed."""
    script = _env.SCRIPTS / "_ttft_model.py"
    sources = [script, *sorted(_env.SCRIPTS.glob("_tiny_*.py"))]
    folder = _env.cache_root() / "models" / f"ttft-{_env.digest_of(sources)[:8]}"
    with _env.locked(folder):
        if not (folder / "config.json").exists():
            command = [str(env.plain), str(script), str(folder)]
            subprocess.run(command, env=_server.inherited(), check=True, timeout=300)
    return folder


def start(pairs: dict[str, Pair], stack: ExitStack) -> None:
    """Start all servers at once; `stack` stops them."""
    for pair in pairs.values():
        stack.callback(pair.stop)
        pair.prefill.start()
        pair.decode.start()
    for pair in pairs.values():
        for server in (pair.prefill, pair.decode):
            try:
                server.wait_until_ready()
            except ServerError:
                print(server.last_lines(30), file=sys.stderr)
                raise


def prompt(tokens: int, draw: random.Random | None = None) -> list[int]:
    """So many random tokens."""
    draw = draw or random.Random(tokens)
    return [draw.choice(SPOKEN) for _ in range(tokens)]


def check(name: str, pair: Pair, lengths: tuple[int, ...], ends: float) -> None:
    """Hold what a pair says to what its prefill server says alone.

    Raises:
        ServerError: They differ, or tokens were not transferred; or another prompt's KV makes no
            difference, so that this could not fail.
    """

    def said(answer: Any) -> list[str]:
        return list(answer["choices"][0]["logprobs"]["tokens"])

    options = {"max_tokens": STEPS, "logprobs": 1, "ignore_eos": True}
    options["return_tokens_as_token_ids"] = True
    alone: dict[int, list[str]] = {}
    for tokens in lengths:
        if time.monotonic() > ends:
            raise ServerError(f"{name}: there was no time left to check {tokens} tokens.")
        alone[tokens] = said(pair.prefill.complete(prompt(tokens), **options))
        before = pair.decode.metric(HITS)
        found = said(pair.complete(prompt(tokens), **options))
        hits = pair.decode.metric(HITS) - before
        if found != alone[tokens] or hits < tokens:
            raise ServerError(
                f"{name}, {tokens} tokens: {found} with {hits:.0f} tokens transferred, and the "
                f"prefill server alone says {alone[tokens]}. Nothing was timed."
            )
    tokens = lengths[0]
    # The last token is computed by decode, from what it was given for the others.
    other = [*prompt(tokens, random.Random(1 + tokens))[:-1], prompt(tokens)[-1]]
    payload = {"model": "model", "prompt": other, "temperature": 0, **options}
    transfer = "control"
    asked = _disaggregated.prefill_payload(payload, transfer)
    pair.prefill.post("/v1/completions", asked, ASK_SECONDS)
    payload |= {"prompt": prompt(tokens), "kv_transfer_params": pair.decode_parameters(transfer)}
    found = said(pair.decode.post("/v1/completions", payload, ASK_SECONDS))
    if found == alone[tokens]:
        raise ServerError(f"{name}: another prompt's KV gives the same tokens. Nothing was timed.")
