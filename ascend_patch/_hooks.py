"""The shim's own hooks in vLLM: no patch, but what makes patches safe.

The compile-cache key, the variables of Ray workers, and the moment when a model is loaded. Each
is fail-open: a release without the seam is served without the hook, and `problems` names it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ascend_patch import _bootstrap, _layers, _ray_environment
from ascend_patch._finder import Finder, Watch

if TYPE_CHECKING:
    from ascend_patch._runtime import Runtime

ENVS = "vllm.envs"
MODEL_LOADER = "vllm.model_executor.model_loader"
RAY_EXECUTORS = ("vllm.v1.executor.ray_executor", "vllm.executor.ray_distributed_executor")
RAY_EXECUTOR_CLASS = "RayDistributedExecutor"
# From 0.20 on there are two, from 0.21 on this one is the default.
RAY_EXECUTOR_V2, RAY_EXECUTOR_V2_CLASS = "vllm.v1.executor.ray_executor_v2", "RayExecutorV2"
DISPATCH = "ascend_patch.kernels.dispatch"
KEY_VARIABLE = "ASCEND_PATCHES_KEY"
# Engines of `--data-parallel-backend ray` are actors too; their environment is put together here.
ENGINE_UTILS, ENGINE_VARIABLES = "vllm.v1.engine.utils", "get_env_vars_to_copy"
RAY_WITHOUT = "Ray's workers start without ASCEND_PATCHES"

# What stands where, and what is lost if it does no more.
_placed: dict[tuple[Any, str], tuple[Any, str]] = {}


def install(finder: Finder, runtime: Runtime) -> None:
    """Watch the modules that hold the seams."""
    finder.watch(ENVS, Watch(after=functools.partial(key_compile_cache, runtime=runtime)))
    finder.watch(MODEL_LOADER, Watch(after=functools.partial(tell_when_loaded, runtime=runtime)))
    for module in RAY_EXECUTORS:
        finder.watch(module, Watch(after=functools.partial(carry_to_ray, runtime=runtime)))
    finder.watch(RAY_EXECUTOR_V2, Watch(after=functools.partial(carry_to_ray_v2, runtime=runtime)))
    finder.watch(ENGINE_UTILS, Watch(after=carry_to_ray_engines))
    finder.watch(DISPATCH, Watch(after=functools.partial(count_kernels, runtime=runtime)))
    if runtime.verification is not None:
        from ascend_patch import _steps

        tell = functools.partial(
            _steps.watch_worker, state=runtime.state, verification=runtime.verification
        )
        for module in _steps.WORKER_BASES:
            finder.watch(module, Watch(after=tell))


def key_compile_cache(envs: ModuleType, runtime: Runtime) -> None:
    """Make the planned patches part of vLLM's compile-cache key.

    From 0.11.1 on every entry of `environment_variables` counts; 0.11.0 hashes a fixed list.
    """
    if not runtime.digest:
        return
    if hasattr(envs, "compile_factors") or not hasattr(envs, "compute_hash"):
        envs.environment_variables[KEY_VARIABLE] = lambda: runtime.digest
        return
    original: Callable[[], str] = envs.compute_hash

    @functools.wraps(original)
    def compute_hash() -> str:
        return f"{original()}-{runtime.digest}"

    _put(envs, "compute_hash", compute_hash, "the compile cache does not know what is patched")


def tell_when_loaded(module: ModuleType, runtime: Runtime) -> None:
    """Call `model_is_loaded` after any loader has built a model."""
    original: Callable[..., Any] = module.get_model_loader

    @functools.wraps(original)
    def get_model_loader(*args: Any, **kwargs: Any) -> Any:
        loader = original(*args, **kwargs)
        load_model = loader.load_model

        @functools.wraps(load_model)
        def load_and_tell(*args: Any, **kwargs: Any) -> Any:
            model = load_model(*args, **kwargs)
            runtime.model_is_loaded(model)
            return model

        # A loader whose instances take no attribute is served without the hook.
        with contextlib.suppress(AttributeError):
            loader.load_model = load_and_tell
        return loader

    lost = "patches are neither tested nor looked at again when a model is loaded"
    _put(module, "get_model_loader", get_model_loader, lost)


def carry_to_ray(module: ModuleType, runtime: Runtime | None = None) -> None:
    """Give Ray workers the shim at process start, through the runtime environment."""
    executor = getattr(module, RAY_EXECUTOR_CLASS)
    original: Callable[..., Any] = executor._init_workers_ray

    @functools.wraps(original)
    def _init_workers_ray(self: Any, placement_group: Any, **ray_remote_kwargs: Any) -> Any:
        _add_to_runtime_env(ray_remote_kwargs.setdefault("runtime_env", {}), runtime)
        return original(self, placement_group, **ray_remote_kwargs)

    _put(executor, "_init_workers_ray", _init_workers_ray, RAY_WITHOUT)


def carry_to_ray_v2(module: ModuleType, runtime: Runtime | None = None) -> None:
    """The same where the executor builds the runtime environment itself."""
    executor = getattr(module, RAY_EXECUTOR_V2_CLASS)
    original: Callable[..., dict[str, Any]] = executor._build_runtime_env

    @functools.wraps(original)
    def _build_runtime_env(self: Any) -> dict[str, Any]:
        runtime_env = original(self)
        _add_to_runtime_env(runtime_env, runtime)
        return runtime_env

    _put(executor, "_build_runtime_env", _build_runtime_env, RAY_WITHOUT)


def carry_to_ray_engines(module: ModuleType) -> None:
    """The same for engines that are Ray actors; a release without them has no such function."""
    original: Callable[..., set[str]] | None = getattr(module, ENGINE_VARIABLES, None)
    if original is None:
        return

    @functools.wraps(original)
    def get_env_vars_to_copy(*args: Any, **kwargs: Any) -> set[str]:
        return _ray_environment.add_to_environ(original(*args, **kwargs))

    _put(module, ENGINE_VARIABLES, get_env_vars_to_copy, RAY_WITHOUT)


def _add_to_runtime_env(runtime_env: dict[str, Any], runtime: Runtime | None) -> None:
    for problem in _ray_environment.add_to(runtime_env):
        _bootstrap.complain(problem)
        if runtime is not None and problem not in runtime.state.problems:
            runtime.state.problems.append(problem)
            runtime.state.write()


def _put(owner: Any, name: str, ours: Any, without: str) -> None:
    setattr(owner, name, ours)
    _placed[owner, name] = ours, without


def lost() -> list[str]:
    """Hooks that somebody has replaced since, as sentences; one that wraps ours keeps it."""
    found = []
    for (owner, name), (ours, without) in _placed.items():
        current = inspect.getattr_static(owner, name, None)
        if not _layers.holds(current, ours):
            other = _layers.foreign(current, "vllm") or "something else"
            found.append(f"our hook on {owner.__name__}.{name} was replaced by {other}: {without}")
    return found


def count_kernels(dispatch: ModuleType, runtime: Runtime) -> None:
    """Count the kernels that run, inside compiled graphs too."""
    counts: dict[str, Callable[[], None]] = {}

    def observe(operator: str) -> None:
        count = counts.get(operator)
        if count is None:
            count = counts[operator] = runtime.state.counters.counter(f"kernel/{operator}")
            runtime.state.write()
        count()

    dispatch.set_observer(observe)
