"""Tells the verification when the host serves a request, and when it only seems to.

The model runner is the one place that every executor comes to (Ray's goes past the workers), in
every release: `WorkerWrapperBase.init_device` has made it, and its `execute_model` is a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ascend_patch._guard import describe, ends_import
from ascend_patch._state import ProcessState
from ascend_patch._verify import VARIABLE, Verification

# 0.11 has the class in the first one, later releases in the second.
WORKER_BASES = ("vllm.worker.worker_base", "vllm.v1.worker.worker_base")
WRAPPER_CLASS = "WorkerWrapperBase"
# Draft models run when tokens are sampled, not when the model is executed.
STEPS = ("execute_model", "sample_tokens")
DUMMIES = ("_dummy_run", "profile_run", "capture_model")
# Its warm-up calls `execute_model` with requests that nobody made.
WARM_UPS = ("compile_or_warm_up_model", "determine_available_memory", "execute_dummy_batch")


def watch_worker(module: ModuleType, state: ProcessState, verification: Verification) -> None:
    """Hook the runner of every worker that this process builds."""
    wrapper = vars(module).get(WRAPPER_CLASS)
    if wrapper is None:
        return
    original: Callable[..., Any] = wrapper.init_device

    @functools.wraps(original)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        try:
            hook_worker(self.worker, verification)
        except BaseException as error:
            if ends_import(error):
                raise
            state.problems.append(f"{VARIABLE}: no step was found: {describe(error)}")
        return result

    wrapper.init_device = init_device


def hook_worker(worker: Any, verification: Verification) -> None:
    """Tell the steps of a worker that has its model runner.

    Raises:
        AttributeError: It has none, or the runner has no `execute_model`.
    """
    runner = worker.model_runner
    runner.execute_model = _step(runner.execute_model, verification)
    if hasattr(runner, "sample_tokens"):
        runner.sample_tokens = _step(runner.sample_tokens, verification, counts=False)
    for owner, names in ((runner, DUMMIES), (worker, WARM_UPS)):
        for name in names:
            if callable(getattr(owner, name, None)):
                setattr(owner, name, _dummy(getattr(owner, name), verification))
    config = getattr(getattr(worker, "vllm_config", None), "model_config", None)
    verification.eager = getattr(config, "enforce_eager", None)
    verification.hooked = True


def _step(
    original: Callable[..., Any], verification: Verification, counts: bool = True
) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        scheduled = args[0] if args else kwargs.get("scheduler_output")
        runs = getattr(scheduled, "total_num_scheduled_tokens", 1) > 0
        with verification.step(counts=counts and runs):
            return original(*args, **kwargs)

    return step


def _dummy(original: Callable[..., Any], verification: Verification) -> Callable[..., Any]:
    @functools.wraps(original)
    def dummy(*args: Any, **kwargs: Any) -> Any:
        with verification.dummy():
            return original(*args, **kwargs)

    return dummy
