"""When a call is part of a real step: a fake worker with the shape that every release has."""

from __future__ import annotations

import types

import pytest

from ascend_patch import _steps, _verify
from ascend_patch._state import ProcessState


class Runner:
    def __init__(self, verification) -> None:
        self.verification = verification
        self.seen: list[tuple[str, bool]] = []

    def note(self, what: str) -> None:
        self.seen.append((what, self.verification.in_step()))

    def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False):
        self.note("step")
        if getattr(scheduler_output, "total_num_scheduled_tokens", 1) == 0:
            # An idle rank keeps its neighbours company.
            self._dummy_run(1)
        return "output"

    def sample_tokens(self, grammar_output):
        self.note("draft")

    def _dummy_run(self, num_tokens):
        self.note("dummy")
        # The second model runner goes through its own execute_model.
        self.execute_model(types.SimpleNamespace(), dummy_run=True) if num_tokens > 1 else None

    def profile_run(self):
        self._dummy_run(8)

    def capture_model(self):
        self.note("capture")


class Worker:
    def __init__(self, runner, enforce_eager=True) -> None:
        self._runner = runner
        config = types.SimpleNamespace(enforce_eager=enforce_eager)
        self.vllm_config = types.SimpleNamespace(model_config=config)

    def init_device(self):
        self.model_runner = self._runner

    def execute_model(self, scheduler_output):
        return self.model_runner.execute_model(scheduler_output)

    def compile_or_warm_up_model(self):
        self.model_runner.profile_run()
        self.model_runner.capture_model()
        # The warm-up of later releases makes requests of its own.
        self.execute_model(types.SimpleNamespace(total_num_scheduled_tokens=4))

    def execute_dummy_batch(self):
        self.model_runner._dummy_run(1)


class WorkerWrapperBase:
    def __init__(self, worker) -> None:
        self.worker = worker

    def init_device(self):
        self.worker.init_device()

    def __getattr__(self, name):
        return getattr(self.worker, name)


@pytest.fixture
def made():
    """(wrapper, runner, verification) of a hooked worker that has its device."""
    state = ProcessState()
    verification = _verify.Verification({"demo": None}, state, lambda *_: None, lambda: None)
    module = types.ModuleType("vllm.v1.worker.worker_base")
    module.WorkerWrapperBase = type("WorkerWrapperBase", (), dict(vars(WorkerWrapperBase)))
    _steps.watch_worker(module, state, verification)
    runner = Runner(verification)
    wrapper = module.WorkerWrapperBase(Worker(runner))
    wrapper.init_device()
    assert state.problems == []
    return wrapper, runner, verification


def tokens(count):
    return types.SimpleNamespace(total_num_scheduled_tokens=count)


def test_a_step_and_what_is_drafted_after_it(made):
    wrapper, runner, verification = made
    assert wrapper.execute_model(tokens(3)) == "output"
    runner.sample_tokens(None)
    assert runner.seen == [("step", True), ("draft", True)]
    assert verification.steps == 1
    assert not verification.in_step()


def test_ray_s_workers_call_the_runner_itself(made):
    _, runner, verification = made
    assert runner.execute_model(tokens(3), None) == "output"
    assert runner.seen == [("step", True)]
    assert verification.steps == 1


def test_profiling_warm_up_capture_and_dummy_batches_are_no_steps(made):
    wrapper, runner, verification = made
    wrapper.compile_or_warm_up_model()
    wrapper.execute_dummy_batch()
    assert {what for what, _ in runner.seen} == {"dummy", "step", "capture"}
    assert not any(real for _, real in runner.seen), runner.seen
    assert verification.steps == 0


def test_a_step_without_tokens_is_none_and_its_dummy_is_one(made):
    wrapper, runner, verification = made
    wrapper.execute_model(tokens(0))
    assert runner.seen == [("step", True), ("dummy", False)]
    assert verification.steps == 0


def test_a_step_that_fails_is_over(made):
    _, runner, verification = made
    with pytest.raises(TypeError):
        runner.execute_model()
    assert not verification.in_step()


@pytest.mark.parametrize("eager", [True, False])
def test_whether_the_server_is_eager_is_read(eager):
    verification = _verify.Verification({}, ProcessState(), lambda *_: None, lambda: None)
    worker = Worker(Runner(verification), eager)
    worker.init_device()
    _steps.hook_worker(worker, verification)
    assert verification.eager is eager


def test_a_worker_without_a_runner_is_a_problem_and_still_a_worker():
    state = ProcessState()
    verification = _verify.Verification({"demo": None}, state, lambda *_: None, lambda: None)
    module = types.ModuleType("vllm.v1.worker.worker_base")
    module.WorkerWrapperBase = type("WorkerWrapperBase", (), dict(vars(WorkerWrapperBase)))
    _steps.watch_worker(module, state, verification)
    worker = types.SimpleNamespace(init_device=lambda: None)
    module.WorkerWrapperBase(worker).init_device()
    assert "no step was found: AttributeError" in state.problems[0]
    verification.model_is_loaded()
    verification.model_is_loaded()
    assert sum("nothing will be compared" in problem for problem in state.problems) == 1


def test_a_module_without_the_class_is_left_alone():
    module = types.ModuleType("vllm.v1.worker.worker_base")
    _steps.watch_worker(module, ProcessState(), None)
    assert not hasattr(module, "WorkerWrapperBase")


# In a process that imports a fake vLLM, with the variable in its environment.

WORKER_BASE = """
class Runner:
    def execute_model(self, scheduler_output):
        import vllm.ops
        return vllm.ops.f(scheduler_output)

class Worker:
    def init_device(self):
        self.model_runner = Runner()

class WorkerWrapperBase:
    def init_device(self):
        self.worker = Worker()
        self.worker.init_device()
"""
SCRIPT = (
    "from vllm.v1.worker.worker_base import WorkerWrapperBase\n"
    "import vllm.ops\n"
    "wrapper = WorkerWrapperBase()\nwrapper.init_device()\n"
    "print(wrapper.worker.model_runner.execute_model(1))\n"
)


@pytest.fixture
def serving(host):
    host.patches('patch("demo", target("vllm.ops:f")), patch("other", target("vllm.more:g"))')
    for package in ("vllm.v1", "vllm.v1.worker"):
        path = host.site.joinpath(*package.split("."))
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text("")
    host.write("vllm.v1.worker.worker_base", WORKER_BASE)
    return host


def test_the_variable_hooks_the_worker(serving):
    found = serving.run(SCRIPT, ASCEND_PATCHES_VERIFY="demo:3")
    assert found.out == "['ours', 'f', 1]\n"
    assert found.state["verification"]["demo"]["calls"] == 3
    # A host seam, which has to ask for a comparison.
    assert found.state["verification"]["demo"]["notes"] == [
        "no target that can be compared was called in 1 step"
    ]


def test_without_the_variable_nothing_is_hooked(serving):
    wrapped = "print(hasattr(type(wrapper).init_device, '__wrapped__'))\n"
    assert serving.run(SCRIPT + wrapped).out.splitlines()[-1] == "False"
    found = serving.run(SCRIPT + wrapped, ASCEND_PATCHES_VERIFY="none")
    assert found.out.splitlines()[-1] == "False"
    assert all(state["verification"] == {} for state in found.states)


def test_garbage_is_refused_with_one_line(serving):
    found = serving.run(SCRIPT, ASCEND_PATCHES_VERIFY="demo:0", fails=True)
    assert found.code == 1
    assert "ASCEND_PATCHES_VERIFY='demo:0'" in found.err
    assert found.out == ""


def test_a_patch_that_is_not_selected_is_said_loudly(serving):
    found = serving.run(SCRIPT, ASCEND_PATCHES="demo", ASCEND_PATCHES_VERIFY="other")
    sentence = "ASCEND_PATCHES_VERIFY names other, which ASCEND_PATCHES does not select"
    assert f"WARNING: {sentence}" in found.err
    assert any(sentence in problem for problem in found.state["problems"])
