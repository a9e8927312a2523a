"""Time to the first token through a prefill and a decode server: scripts/bench kv ttft, anywhere.

Real vLLM servers on a CPU, a random model made here, KV over Mooncake's TCP on this machine's
loopback. For each ratio of tensor parallel sizes, on vLLM's own CPU attention (HND) and on the
emulated device (NHD, where a smaller decode TP merges): `pair`, prefill and then decode; `prefill
alone` and `decode alone`, each of the two servers computing the whole prompt itself. At equal sizes
on HND also `pair, unpatched`: two more servers that have never seen the shim, asked in turns with
the others.

Before anything is timed, a pair must say token for token what its prefill server says alone, with
all tokens of the prompts counted as transferred; and given another prompt's KV it must say
something else, or the comparison could not fail. An answer that does not come in time is counted
under `failed` and is in no median. `prefill_ms` of a pair is until prefill has answered, `after_ms`
from there to the first token: the transfer, and one step of decode. `others` is what other
processes had of the processors meanwhile, in cores: read figures beside it.

A pair of sizes is one run of a few minutes. Its rows replace those in the folder of --out as soon
as they are there, so --missing goes on where a run was stopped.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import _env
import _serve
import _ttft_model
import _ttft_picture
from _bench_rope import write_csv
from _disaggregated import Pair, Sizes
from _server import Server, ServerError
from _system import SetupError, say
from _ttft_machine import Others, facts
from _ttft_servers import ASK_SECONDS, block_of, check, make_pair, prompt, start

RATIOS = ("2:1", "1:2", "1:1")
LAYOUTS = ("HND", "NHD")
TOKENS = (64, 128, 512, 1024, 2048)
LEAST = 3  # answers of which there is a median
KEY = ("prefill_tp", "decode_tp", "layout")
COLUMNS = (*KEY, "block", "tokens", "kv_bytes", "what", "ttft_ms", "q1_ms", "q3_ms", "min_ms")
COLUMNS += ("max_ms", "prefill_ms", "after_ms", "answers", "failed", "others")
PAIR, UNPATCHED, PREFILL, DECODE = "pair", "pair, unpatched", "prefill alone", "decode alone"

Row = dict[str, Any]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench kv ttft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ratios", nargs="*", default=RATIOS, help=f"of {' '.join(RATIOS)}")
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="of the prompts")
    parser.add_argument("--rounds", type=int, default=15, help="of each prompt, if there is time")
    parser.add_argument("--deadline", type=float, default=330, help="seconds for a pair of sizes")
    parser.add_argument("--out", type=Path, help="folder for kv_ttft.csv and the plot")
    parser.add_argument("--missing", action="store_true", help="only what is not in --out yet")
    parser.add_argument("--plot", action="store_true", help="only draw what is in --out")
    parser.add_argument("--commit", default="", help="what to record where git is not there")
    arguments = parser.parse_args(argv)
    if arguments.plot:
        _ttft_picture.write(arguments.out or Path())
        return 0
    # A terminated benchmark still stops its servers.
    signal.signal(signal.SIGTERM, _serve.interrupt)
    try:
        run(arguments)
    except (SetupError, ServerError, ValueError) as error:
        print(f"scripts/bench kv ttft: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped; what was measured whole is kept")
        return 130
    return 0


def run(arguments: argparse.Namespace) -> None:
    env = _env.prepare(device="cpu", release=_env.DEFAULT)
    known = facts(env, arguments.commit)
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    path = arguments.out and arguments.out / "kv_ttft.csv"
    wrong: list[str] = []
    for ratio, layout in itertools.product(arguments.ratios, arguments.layouts):
        sizes = Sizes(*map(int, ratio.split(":")))
        key = tuple(map(str, (sizes.prefill, sizes.decode, layout)))
        kept = read(path) if path else []
        if arguments.missing and any(key == tuple(row[name] for name in KEY) for row in kept):
            continue
        try:
            rows = [row | known for row in measure(env, sizes, layout, arguments)]
        except ServerError as error:
            # The other sizes are as good without it.
            wrong.append(f"{sizes}, {layout}: {error}")
            say(wrong[-1])
            continue
        if path:
            arguments.out.mkdir(parents=True, exist_ok=True)
            rows += [row for row in kept if key != tuple(row[name] for name in KEY)]
            write_csv(path, sorted(rows, key=order), {}, (*COLUMNS, *known))
            _ttft_picture.write(arguments.out)
    if wrong:
        raise ServerError("; ".join(wrong))


def read(path: Path) -> list[Row]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def order(row: Row) -> tuple[Any, ...]:
    ratio = f"{row['prefill_tp']}:{row['decode_tp']}"
    place = RATIOS.index(ratio) if ratio in RATIOS else len(RATIOS)
    return row["layout"], place, ratio, int(row["tokens"])


def measure(
    env: _env.Environment, sizes: Sizes, layout: str, arguments: argparse.Namespace
) -> list[Row]:
    """The rows of one pair of sizes; servers are started, checked, timed and stopped."""
    ends = time.monotonic() + arguments.deadline
    names = [PAIR]
    if sizes.prefill == sizes.decode and layout == "HND":
        names.append(UNPATCHED)
    block = block_of(layout)
    # Less than a block moves as many bytes as a block.
    lengths = tuple(tokens for tokens in arguments.tokens if tokens >= block)
    logs = _env.cache_root() / "logs" / f"ttft-{time.strftime('%Y%m%dT%H%M%S')}"
    say(f"{sizes}, {layout}, logs in {logs}")
    with ExitStack() as stack:
        pairs = {
            name: make_pair(env, sizes, layout, logs / name.split()[-1], name != UNPATCHED)
            for name in names
        }
        start(pairs, stack)
        say(f"{sizes}, {layout}: {len(pairs)} pairs ready, {ends - time.monotonic():.0f} s left")
        for name, pair in pairs.items():
            check(name, pair, lengths, ends)
        say(f"checked, {ends - time.monotonic():.0f} s left")
        samples = take(pairs, lengths, arguments.rounds, ends)
    every = {f"{tokens} tokens, {what}": found for (tokens, what), found in samples.items()}
    (logs / "samples.json").write_text(json.dumps(every, indent=1))
    rows = []
    for (tokens, what), found in samples.items():
        place = (sizes.prefill, sizes.decode, layout, block, tokens)
        row = (*place, _ttft_model.kv_bytes(tokens, block), what, *summary(what, found))
        print(" ".join(f"{value!s:>14}" for value in row), flush=True)
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def take(
    pairs: dict[str, Pair], lengths: tuple[int, ...], rounds: int, ends: float
) -> dict[tuple[int, str], list[tuple[float, ...] | None]]:
    """Samples (first token, prefill, cores of others) by prompt and what was asked, in turns."""
    first = pairs[PAIR]
    variants: list[tuple[str, Pair | Server]] = [*pairs.items()]
    variants += [(PREFILL, first.prefill), (DECODE, first.decode)]
    engines = {name: pair.engine() for name, pair in pairs.items()}
    servers = [server for pair in pairs.values() for server in (pair.prefill, pair.decode)]
    others = Others(server.process.pid for server in servers if server.process)
    samples: dict[tuple[int, str], list[tuple[float, ...] | None]] = {
        (tokens, what): [] for tokens in lengths for what, _ in variants
    }
    draw = random.Random()
    for turn in range(rounds):
        began = time.monotonic()
        shift = turn % len(variants)
        for tokens in lengths:
            for what, asked in variants[shift:] + variants[:shift]:
                if time.monotonic() > ends:
                    break
                others.cores()
                try:
                    times = ask(asked, prompt(tokens, draw), engines.get(what, ""))
                except ServerError as error:
                    say(f"{tokens} tokens, {what}: {error}")
                    samples[tokens, what].append(None)
                else:
                    samples[tokens, what].append((*times, others.cores()))
        # A round that would be cut short would leave rows of different times.
        if time.monotonic() + (time.monotonic() - began) > ends:
            break
    return samples


def ask(asked: Pair | Server, words: list[int], engine: str) -> tuple[float, float]:
    """(seconds to the first token, those of them in which prefill answered)."""
    if isinstance(asked, Pair):
        found = asked.timed(words, seconds=ASK_SECONDS, engine=engine, max_tokens=1)
        return found.first_token, found.prefill
    payload = {"model": "model", "prompt": words, "temperature": 0, "max_tokens": 1}
    began = time.monotonic()
    asked.post("/v1/completions", payload, ASK_SECONDS)
    return time.monotonic() - began, 0.0


def summary(what: str, found: list[tuple[float, ...] | None]) -> Iterator[Any]:
    """ttft_ms and what follows it of COLUMNS."""
    right = [sample for sample in found if sample]
    if len(right) < LEAST:
        raise ServerError(f"{what}: {len(right)} answers of {len(found)} are too few to be a row.")
    times = [1e3 * sample[0] for sample in right]
    low, middle, high = quantiles(times, n=4, method="inclusive")
    for value in (middle, low, high, min(times), max(times)):
        yield round(value, 1)
    if what in (PREFILL, DECODE):
        yield from ("", "")
    else:
        yield round(1e3 * median(s[1] for s in right), 1)
        yield round(1e3 * median(s[0] - s[1] for s in right), 1)
    yield len(right)
    yield len(found) - len(right)
    yield round(median(sample[2] for sample in right), 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
