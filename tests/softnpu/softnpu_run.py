"""tests/softnpu/run: a command on the software NPU.

Makes the environment of a vllm-ascend release and compiles the device when they are missing, then
starts the command with them: `python` is the environment's, `import torch_npu` finds NPUs.

    tests/softnpu/run -- python -c 'import torch, torch_npu; print(torch.ones(2, device="npu"))'
    tests/softnpu/run --devices 2 --trace /tmp/trace -- python my_script.py
    tests/softnpu/run --late all -- python my_script.py        # a missing wait is a wrong result
    tests/softnpu/run --path ~/vllm-ascend -- vllm serve ...   # one's own branch, in place
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from _system import SetupError
from softnpu_environment import RECIPES, Environment


def parse(arguments: list[str]) -> argparse.Namespace:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="tests/softnpu/run",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- command",
    )
    parser.add_argument("--vllm-ascend", choices=list(RECIPES), default="0.18.0")
    parser.add_argument("--devices", type=int, default=1, help="NPUs that there are (1)")
    parser.add_argument("--memory-gb", type=int, default=64, help="of each (64)")
    parser.add_argument("--soc", default="Ascend910B3", help="name of the chip (Ascend910B3)")
    parser.add_argument(
        "--late",
        choices=["all", "default", "side"],
        help="streams that run when something is ordered behind them (none)",
    )
    parser.add_argument("--trace", type=Path, help="folder for what each process called")
    parser.add_argument(
        "--path", type=Path, action="append", default=[], help="a folder for PYTHONPATH, first"
    )
    args = parser.parse_args(arguments[:split])
    args.command = arguments[split + 1 :]
    if not args.command:
        parser.error("there is no command; put it behind --")
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    try:
        environment = Environment(args.vllm_ascend).prepare()
    except SetupError as error:
        print(f"software NPU: {error}", file=sys.stderr)
        return 1
    variables = dict(os.environ) | environment.variables(devices=args.devices)
    path = [*map(str, args.path), variables["PYTHONPATH"]]
    variables["PYTHONPATH"] = os.pathsep.join(path)
    variables |= {"SOFTNPU_MEMORY_GB": str(args.memory_gb), "SOFTNPU_SOC": args.soc}
    if args.late:
        variables["SOFTNPU_LATE"] = args.late
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
        variables["SOFTNPU_TRACE"] = str(args.trace.absolute())
    found = shutil.which(args.command[0], path=variables["PATH"])
    if found is None:
        print(f"software NPU: there is no command {args.command[0]!r}", file=sys.stderr)
        return 127
    return os.execve(found, args.command, variables)


if __name__ == "__main__":
    sys.exit(main())
