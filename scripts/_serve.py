"""scripts/serve: a patched vLLM server from nothing, unattended.

Makes an environment (or uses the one it is started in, if that has vLLM), makes a tiny random
model (unless --model names one), starts the server with ASCEND_PATCHES set, asks it for a
completion and prints what `ascend-patch status` says. Everything after -- goes to vLLM.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _env
from _server import HOST, Server, ServerError, base_variables, cpu_variables
from _system import SetupError, say

PROMPT = "The people know how to make"
LOG_LINES = 40
# Kinds of _tiny_weights, by family; of GDN models the one whose sizes every release takes.
TINY = {"qwen3": "qwen3", "qwen3-next": "qwen3-next-square"}
STATUS_SECONDS = 120
SOFTNPU = _env.CHECKOUT / "tests/softnpu"
SOFTNPU_DEVICES = 8
# Memory is the host's there: a cache for some thousands of tokens, not a share of 64 GB.
SOFTNPU_ARGUMENTS = ("--num-gpu-blocks-override", "256", "--kv-cache-memory-bytes", "268435456",
                     "--gpu-memory-utilization", "0.05")  # fmt: skip
# Ours to say, whatever the caller's shell holds: the shim joins a run that it finds announced.
NOT_INHERITED = ("ASCEND_PATCHES_RUN", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME")


def parse(arguments: list[str]) -> argparse.Namespace:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description=__doc__.partition("\n\n")[2],
        usage="%(prog)s [options] [-- vLLM's own arguments]",
    )
    parser.add_argument("--model", help="a model's folder; a tiny random one if not given")
    parser.add_argument("--tiny", choices=TINY, default="qwen3", help="which one (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="go on serving until Ctrl-C")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--device", choices=["auto", "npu", "cuda", "cpu"], default="auto")
    parser.add_argument(
        "--vllm",
        dest="release",
        choices=list(_env.RELEASES),
        help=f"the release to make an environment for (CPU; otherwise {_env.DEFAULT}, or the one "
        "that is there)",
    )
    parser.add_argument(
        "--vllm-ascend",
        dest="ascend",
        metavar="RELEASE",
        help="serve with that release of vllm-ascend on the software NPU (docs/softnpu.md), on any "
        "x86-64 Linux; 0.13.0, 0.18.0 or 0.23.0",
    )
    parser.add_argument("--deadline", type=float, default=900, help="seconds to start (900)")
    args = parser.parse_args(arguments[:split])
    if args.ascend and (args.release or args.device not in ("auto", "npu")):
        parser.error("--vllm-ascend brings its vLLM and its device; leave --vllm and --device out")
    args.vllm = arguments[split + 1 :]
    return args


def software_npu(release: str) -> tuple[_env.Environment, dict[str, str]]:
    """Return where a release of vllm-ascend runs, made if need be, and its variables."""
    sys.path.append(str(SOFTNPU))
    import softnpu_environment

    npu = softnpu_environment.Environment(release).prepare()
    variables = npu.variables(devices=SOFTNPU_DEVICES)
    env = _env.Environment(npu.python, npu.python, "npu", drop_in=str(_env.CHECKOUT))
    return env, {name: variables[name] for name in variables.keys() - {"PATH", "PYTHONPATH"}}


def tiny_model(env: _env.Environment, kind: str, dtype: str = "bfloat16") -> Path:
    """Return a tiny model, made with the environment's own torch when it is first needed."""
    script = _env.SCRIPTS / "_tiny_model.py"
    sources = sorted(_env.SCRIPTS.glob("_tiny_*.py"))
    name = f"tiny-{kind}-{dtype}-{_env.digest_of(sources)[:8]}"
    folder = _env.cache_root() / "models" / name
    with _env.locked(folder):
        if not (folder / "config.json").exists():
            say(f"making a tiny random {kind} in {folder}")
            # Weights are drawn on the CPU; torch would load a device's package by itself, and where
            # torch_npu is, fail without its libraries.
            variables = server_variables(env)
            variables |= {"ASCEND_PATCHES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
            done = subprocess.run(
                [str(env.python), str(script), str(folder), "--kind", kind, "--dtype", dtype],
                cwd=_env.cache_root(),
                env=variables,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            if done.returncode:
                raise SetupError(f"The tiny model cannot be made: {done.stderr.strip()[-800:]}")
    return folder


def server_variables(env: _env.Environment) -> dict[str, str]:
    """Return the caller's environment with what the server and the shim need."""
    variables = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    if env.plain != env.python:
        # An environment of our own; a user's may need its PYTHONPATH (Ascend's CANN does).
        variables.pop("PYTHONPATH", None)
    if env.drop_in:
        rest = variables.get("PYTHONPATH")
        variables["PYTHONPATH"] = f"{env.drop_in}:{rest}" if rest else env.drop_in
    if env.preload:
        variables["LD_PRELOAD"] = env.preload
    defaults = base_variables() | (cpu_variables() if env.device == "cpu" else {})
    for name, value in defaults.items():
        variables.setdefault(name, value)
    variables["ASCEND_PATCHES"] = os.environ.get("ASCEND_PATCHES", "all")
    # As `activate` does: programs that vLLM starts (ninja, a compiler) are found there.
    variables["PATH"] = f"{env.plain.parent}:{variables.get('PATH', os.defpath)}"
    return variables


class Progress:
    """One line that is rewritten on a terminal, and a line each ten seconds elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.next = 0.0

    def __call__(self, elapsed: float, line: str) -> None:
        last = line.rpartition("] ")[2] or line
        if self.terminal:
            width = shutil.get_terminal_size().columns - 16
            print(f"\r\033[K  {elapsed:4.0f} s  {last[:width]}", end="", flush=True)
        elif elapsed >= self.next:
            self.next = elapsed + 10
            say(f"{elapsed:4.0f} s  {last[:120]}")

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="")


def print_status(env: _env.Environment, variables: dict[str, str]) -> None:
    """Print `ascend-patch status` of that environment; it reads files and patches nothing."""
    done = subprocess.run(
        [str(env.python), "-m", "ascend_patch", "status"],
        cwd=tempfile.gettempdir(),
        env=variables | {"ASCEND_PATCHES": "", "LD_PRELOAD": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=STATUS_SECONDS,
        check=False,
    )
    print(done.stdout.rstrip(), flush=True)
    if done.returncode:
        raise SetupError(f"`ascend-patch status` failed with exit code {done.returncode}.")


def serve(args: argparse.Namespace) -> None:
    arguments, on_npu = list(args.vllm), {}
    if args.ascend:
        env, on_npu = software_npu(args.ascend)
        arguments = [*SOFTNPU_ARGUMENTS, *arguments]
    else:
        env = _env.prepare(device=args.device, release=args.release)
    if args.model is None:
        model = str(tiny_model(env, TINY[args.tiny]))
        # Nothing to gain from compiling a tiny model, and a minute to lose.
        arguments = ["--enforce-eager", "--max-model-len", "2048", *arguments]
    else:
        model = args.model
        if Path(model).exists():
            model = str(Path(model).absolute())
    variables = server_variables(env) | on_npu
    log = _env.cache_root() / "logs" / f"serve-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    progress = Progress()
    server = Server(
        env.python,
        model,
        env=variables,
        log=log,
        arguments=arguments,
        ready_seconds=args.deadline,
        progress=progress,
    )
    server.port = args.port or server.port
    say(server.shell_command())
    try:
        with server:
            progress.end()
            say(f"ready in {server.started_in:.0f} s at http://{HOST}:{server.port}/v1")
            answer = server.complete(args.prompt, max_tokens=16)["choices"][0]["text"]
            print(f"prompt: {args.prompt}\nanswer: {answer}\n", flush=True)
            print_status(env, variables)
            if args.keep:
                keep_serving(server)
    except ServerError:
        progress.end()
        print(server.last_lines(LOG_LINES), file=sys.stderr)
        raise


def keep_serving(server: Server) -> None:
    say(f"serving model `model` at http://{HOST}:{server.port}/v1 until Ctrl-C; log: {server.log}")
    assert server.process is not None
    code = server.process.wait()
    raise server.failed(f"The server ended with exit code {code}.")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    # A terminated command still stops the server that it started.
    signal.signal(signal.SIGTERM, interrupt)
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
