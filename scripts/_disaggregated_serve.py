"""scripts/serve_disaggregated: a prefill and a decode server from nothing, and a proxy before them.

Makes an environment as scripts/serve does, installs Mooncake's engine, starts two patched vLLM
servers of the tensor-parallel sizes that are asked for, and a small proxy; asks it for a completion
and prints the tokens, the time to the first of them, and what `ascend-patch status` says.
Everything after -- goes to both vLLMs. The servers talk over TCP on this machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import _disaggregated
import _env
import _serve
from _disaggregated import Pair, Sizes
from _disaggregated_proxy import Proxy
from _server import HOST, ServerError, free_port
from _system import SetupError, say

PROMPT = "The people know how to make"
REQUESTS = 4
TOKENS = 16
ASK_SECONDS = 120


def parse(arguments: list[str]) -> argparse.Namespace:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="scripts/serve_disaggregated",
        description=__doc__.partition("\n\n")[2],
        usage="%(prog)s [options] [-- vLLM's own arguments]",
    )
    parser.add_argument("--prefill-tp", type=int, default=2, help="default: 2")
    parser.add_argument("--decode-tp", type=int, default=1, help="default: 1")
    parser.add_argument("--model", help="a model's folder; a tiny random Qwen3 if not given")
    parser.add_argument("--keep", action="store_true", help="go on serving until Ctrl-C")
    parser.add_argument("--port", type=int, help="of the proxy; default: a free one")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--policy", choices=["fail", "recompute"], default="")
    parser.add_argument("--deadline", type=float, default=900, help="seconds to start (900)")
    args = parser.parse_args(arguments[:split])
    args.vllm = arguments[split + 1 :]
    return args


def serve(args: argparse.Namespace) -> None:
    env = _env.prepare(device="auto", release=None)
    arguments = list(args.vllm)
    if args.model is None:
        model = str(_serve.tiny_model(env, "qwen3"))
        arguments = ["--enforce-eager", "--max-model-len", "2048", *arguments]
    else:
        model = str(Path(args.model).absolute()) if Path(args.model).exists() else args.model
    variables = _serve.server_variables(env)
    engine = str(_disaggregated.engine_folder(env.plain))
    variables["PYTHONPATH"] = ":".join(filter(None, (variables.get("PYTHONPATH"), engine)))
    sizes = Sizes(args.prefill_tp, args.decode_tp)
    logs = _env.cache_root() / "logs" / f"pair-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    pair = _disaggregated.make_pair(
        env.python,
        model,
        sizes,
        env=variables,
        folder=logs,
        arguments=arguments,
        policy=args.policy,
        ready_seconds=args.deadline,
    )
    say(f"ASCEND_PATCHES={variables['ASCEND_PATCHES']} {sizes}, logs in {logs}")
    for server in (pair.prefill, pair.decode):
        say(" ".join(server.command()))
    try:
        with pair, Proxy(pair, args.port or free_port(), say) as proxy:
            started = max(pair.prefill.started_in, pair.decode.started_in)
            say(f"ready in {started:.0f} s, the proxy at http://{HOST}:{proxy.port}/v1")
            ask(pair, proxy, args.prompt)
            _serve.print_status(env, variables)
            if args.keep:
                keep_serving(pair, proxy)
    except ServerError:
        for server in (pair.prefill, pair.decode):
            print(f"--- {server.log}", server.last_lines(_serve.LOG_LINES), file=sys.stderr)
        raise


def ask(pair: Pair, proxy: Proxy, prompt: str) -> None:
    """Ask through the proxy, print the tokens and times, and what the prefill server alone says."""
    alone = pair.prefill.complete(prompt, max_tokens=TOKENS)["choices"][0]["text"]
    for _ in range(REQUESTS):
        complete(proxy, prompt, max_tokens=1)
    times = ", ".join(f"{1e3 * seconds:.0f}" for seconds in proxy.first_tokens)
    choice = complete(proxy, prompt, max_tokens=TOKENS, logprobs=1)["choices"][0]
    print(f"prompt:  {prompt}\nanswer:  {choice['text']}\ntokens:  {choice['logprobs']['tokens']}")
    print(f"the prefill server alone:  {alone}")
    print(f"time to first token:  {times} ms\n", flush=True)


def complete(proxy: Proxy, prompt: str, **options: Any) -> Any:
    """Ask /v1/completions of the proxy, greedily."""
    payload = {"model": "model", "prompt": prompt, "temperature": 0, **options}
    connection = http.client.HTTPConnection(HOST, proxy.port, timeout=ASK_SECONDS)
    try:
        connection.request("POST", "/v1/completions", json.dumps(payload))
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"The proxy does not answer: {error!r}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise ServerError(f"The proxy answers {response.status}: {body.decode()[:500]}")
    return json.loads(body)


def keep_serving(pair: Pair, proxy: Proxy) -> None:
    say(f"serving model `model` at http://{HOST}:{proxy.port}/v1 until Ctrl-C")
    while True:
        for name, server in (("prefill", pair.prefill), ("decode", pair.decode)):
            assert server.process is not None
            code = server.process.poll()
            if code is not None:
                raise ServerError(f"The {name} server ended with exit code {code}: {server.log}")
        time.sleep(1)


def main() -> int:
    # A terminated command still stops the servers that it started.
    signal.signal(signal.SIGTERM, _serve.interrupt)
    try:
        serve(parse(sys.argv[1:]))
    except (SetupError, ServerError) as error:
        print(f"ascend-patch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
