"""Run by test_boot_peers_real.py: an engine in one process, and what its neighbours have seen.

The first argument is an order as JSON: the model, when ddtrace's and Liger's patches come (`before`
or `after` vLLM is imported, or empty for not at all), and whether vLLM traces by OpenTelemetry.
"""

from __future__ import annotations

import inspect
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

PROMPTS = ("water", "The people know how to make", "one two three four five six seven")
# What ddtrace wraps, and it alone.
WRAPPED = (
    ("vllm.v1.engine.llm_engine", "LLMEngine", "__init__"),
    ("vllm.v1.engine.async_llm", "AsyncLLM", "add_request"),
    ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs"),
    ("vllm.v1.engine.output_processor", "OutputProcessor", "process_outputs"),
)


def keep_ddtraces_spans() -> list[str]:
    """Names of finished spans, as they come; none is sent anywhere."""
    from ddtrace.trace import TraceFilter, tracer

    names: list[str] = []

    class Keep(TraceFilter):
        def process_trace(self, trace):
            names.extend(span.name for span in trace)

    tracer.configure(trace_processors=[Keep()])
    return names


def receive_spans() -> tuple[list[str], str]:
    """Names of the spans that an exporter posts, as they come, and where to post them."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    names: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    names.extend(span.name for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            return

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return names, f"http://127.0.0.1:{server.server_port}/v1/traces"


def apply_liger() -> str:
    """Liger's functions in transformers' Qwen3; returns where its rotation is from."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    from transformers.models.qwen3 import modeling_qwen3

    apply_liger_kernel_to_qwen3()
    return modeling_qwen3.apply_rotary_pos_emb.__module__


def main(order: dict) -> dict:
    said: dict = {"liger": ""}
    posted: list[str] = []
    settings: dict = {}
    by_sitecustomize = "ddtrace.bootstrap.sitecustomize" in sys.modules
    names = keep_ddtraces_spans() if by_sitecustomize or order["ddtrace"] else []
    if order["ddtrace"] == "before":
        import ddtrace

        ddtrace.patch(vllm=True)
    if order["liger"] == "before":
        said["liger"] = apply_liger()
    import torch

    torch.set_num_threads(1)
    from vllm import LLM, SamplingParams

    if order["ddtrace"] == "after":
        import ddtrace

        ddtrace.patch(vllm=True)
    if order["otel"]:
        posted, settings["otlp_traces_endpoint"] = receive_spans()
    llm = LLM(
        order["model"], dtype="float32", enforce_eager=True, max_model_len=256,
        enable_prefix_caching=False, **settings,
    )  # fmt: skip
    if order["liger"] == "after":
        said["liger"] = apply_liger()
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=3, ignore_eos=True)
    answers = [answer.outputs[0] for answer in llm.generate(list(PROMPTS), sampling)]
    if order["otel"]:
        from opentelemetry import trace

        trace.get_tracer_provider().force_flush()
    said["tokens"] = [list(answer.token_ids) for answer in answers]
    said["logprobs"] = [
        [step[token].logprob for step, token in zip(a.logprobs, a.token_ids, strict=True)]
        for a in answers
    ]
    said["spans"], said["posted"] = list(names), list(posted)
    said["wrapped"] = [is_wrapped(*place) for place in WRAPPED]
    said["patched"], said["reverted"] = {}, []
    if "ascend_patch" in sys.modules:
        said |= ours(llm, sampling)
    return said


def is_wrapped(module: str, owner: str, name: str) -> bool:
    import importlib

    found = inspect.getattr_static(getattr(importlib.import_module(module), owner), name)
    return type(found).__name__ == "FunctionWrapper"


def ours(llm, sampling) -> dict:
    """The record of our own patches, and the engine once more without them."""
    import ascend_patch

    status = ascend_patch.status()
    patched = {
        patch["id"]: {
            "state": patch["state"],
            "targets": {t["id"]: [t["state"], t["reason"], t["calls"]] for t in patch["targets"]},
        }
        for patch in status["patches"]
    }
    for name, patch in patched.items():
        if patch["state"] == "applied":
            ascend_patch.revert(name)
    answers = [answer.outputs[0] for answer in llm.generate(list(PROMPTS), sampling)]
    return {
        "patched": patched,
        "problems": status["problems"],
        "peers": status["peers"],
        "reverted": [list(answer.token_ids) for answer in answers],
        "wrapped after": [is_wrapped(*place) for place in WRAPPED],
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
