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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _disaggregated
import _env
import _serve
from _disaggregated import Pair, Sizes
from _disaggregated_proxy import Proxy
from _server import HOST, ServerError
from _system import SetupError, find_device, say

PROMPT = "The people know how to make"
PATCH = "kv_connector"
REQUESTS = 4
TOKENS = 16
ASK_SECONDS = 120


def size(text: str) -> int:
    """A tensor-parallel size."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no tensor-parallel size: 1, 2, 4 ...")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="scripts/serve_disaggregated",
        description=__doc__.partition("\n\n")[2],
        usage="%(prog)s [options] [-- vLLM's own arguments]",
    )
    parser.add_argument("--prefill-tp", type=size, default=2, metavar="TP", help="default: 2")
    parser.add_argument("--decode-tp", type=size, default=1, metavar="TP", help="default: 1")
    parser.add_argument("--model", help="a model's folder; a tiny random Qwen3 if not given")
    parser.add_argument("--keep", action="store_true", help="go on serving until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="of the proxy; default: a free one")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument(
        "--policy",
        choices=["fail", "recompute"],
        default="",
        help="vLLM's kv_load_failure_policy of both servers; default: vLLM's",
    )
    parser.add_argument("--deadline", type=float, default=900, help="seconds to start (900)")
    args = parser.parse_args(arguments[:split])
    args.vllm = arguments[split + 1 :]
    return args


def serve(args: argparse.Namespace) -> None:
    if (device := find_device()) != "cpu":
        raise SetupError(
            f"This machine has a device ({device}), and this starts servers on CPUs alone. Start "
            "your two servers as usual, with --kv-transfer-config and ASCEND_PATCHES set for both."
        )
    env = _env.prepare(device="cpu", release=None)
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
    refuse_what_cannot_start(env, variables, Path(model), sizes)
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
    proxy = Proxy(pair, args.port, say)
    say(f"ASCEND_PATCHES={variables['ASCEND_PATCHES']} {sizes}, logs in {logs}")
    for server in (pair.prefill, pair.decode):
        say(server.shell_command())
    try:
        with pair, proxy:
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


def refuse_what_cannot_start(
    env: _env.Environment, variables: dict[str, str], model: Path, sizes: Sizes
) -> None:
    """Say what two servers would take a minute each to stumble over.

    Raises:
        SetupError: The model's heads cannot be cut into these sizes, or the sizes differ and this
            vLLM has no connector that the patch knows.
    """
    try:
        config = json.loads((model / "config.json").read_text())
        heads = int(config.get("text_config", config)["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        heads = 0  # vLLM may find out more about it
    for name, tp in (("prefill", sizes.prefill), ("decode", sizes.decode)):
        if heads % tp:
            raise SetupError(
                f"The model has {heads} attention heads, which {tp} ranks cannot share: name "
                f"another --{name}-tp."
            )
    if sizes.prefill == sizes.decode:
        return
    done = subprocess.run(
        [str(env.python), "-m", "ascend_patch", "list", "--json"],
        cwd=tempfile.gettempdir(),
        env=variables | {"ASCEND_PATCHES": "", "LD_PRELOAD": ""},
        capture_output=True,
        text=True,
        timeout=_serve.STATUS_SECONDS,
        check=False,
    )
    if done.returncode:
        raise SetupError(f"`ascend-patch list` failed: {done.stderr.strip()[-400:]}")
    try:
        found = next(one for one in json.loads(done.stdout)["patches"] if one["id"] == PATCH)
    except ValueError as error:
        raise SetupError(
            f"`ascend-patch list --json` printed no JSON alone ({error}); a sitecustomize of "
            f"{env.python} may print too."
        ) from error
    if found["state"] not in ("armed", "retired"):
        raise SetupError(
            f"{sizes} needs kv_connector, which is {found['state']} here: {found['reason']}. It is "
            f"for {found['applies_to']}."
        )


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
                raise server.failed(f"The {name} server ended with exit code {code}.")
        time.sleep(1)


def interrupt_once(*_: object) -> None:
    """Unwind, and let nothing disturb that: a second Ctrl-C would leave a server behind."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    # A terminated command still stops the servers that it started.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt_once)
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
