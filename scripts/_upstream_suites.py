"""Which of the hosts' own tests are run, and which of them our code answers in another way."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """The tests of one release that run without an accelerator.

    Attributes:
        distribution: The sdist that carries them.
        areas: Files and folders of tests by the patch that they are near to.
        quick: The area that everyday runs take.
        differs: What our code makes of a test, and why that is meant: the test's id, or a part of
            it that several share, and a sentence. One that no longer differs is an error.
        choose: Of an area, the tests that are taken, as pytest's -k has it.
    """

    distribution: str
    areas: dict[str, tuple[str, ...]]
    quick: str = "rotary"
    differs: dict[str, str] = field(default_factory=dict)
    choose: dict[str, str] = field(default_factory=dict)


VLLM_0_18 = Suite(
    distribution="vllm",
    areas={
        "rotary": (
            "tests/kernels/core/test_pos_encoding.py",
            "tests/kernels/core/test_apply_rotary_emb.py",
            "tests/kernels/core/test_mrope.py",
            "tests/compile/test_rotary_embedding_compile.py",
            "tests/model_executor/test_qwen3_vl_mrope.py",
        ),
        "attention": (
            "tests/kernels/attention/test_attention_selector.py",
            "tests/test_attention_backend_registry.py",
            "tests/v1/attention/test_attention_backends_selection.py",
            "tests/v1/attention/test_attention_splitting.py",
            "tests/v1/attention/test_chunked_local_attention.py",
        ),
        "gdn": (
            "tests/v1/attention/test_gdn_metadata_builder.py",
            "tests/v1/attention/test_mamba_update_block_table.py",
            "tests/v1/worker/test_mamba_utils.py",
        ),
        # Those of connectors that are packages of their own are left out.
        "kv": tuple(
            f"tests/v1/kv_connector/unit/test_{name}.py"
            for name in (
                "backwards_compatibility",
                "cache_pollution_prevention",
                "config",
                "decode_bench_connector",
                "error_propagation",
                "invalid_blocks_correctness",
                "kv_cache_layout",
                "kv_connector_lifecycle",
                "kv_load_failure_recovery",
                "output_aggregator",
                "remote_decode_lifecycle",
                "remote_prefill_lifecycle",
            )
        ),
    },
    # The second device is the first one here; 8192 tokens are the same code 745 times slower.
    choose={"rotary": "not cuda:1 and not 8192 and not qwen3_vl"},
)

MOONCAKE = "test_mooncake_connector.py::"
MOCKED = {
    f"{MOONCAKE}TestMooncakeConnectorWorker::test_register_kv_caches": (
        "its kv_connector_extra_config is a mock, and ours refuses a setting that is no number"
    ),
    f"{MOONCAKE}TestCoreFunctionality::test_transfer_kv_cache": (
        "its receiving thread has registered no caches and so has no settings of ours; a pull that "
        "ours knows nothing of fails, and is not taken for done"
    ),
    f"{MOONCAKE}TestMooncakeConnectorSchedulerMatchedTokens::test_build_connector_meta": (
        "its request is a mock without the arrival_time that vLLM's requests have, which ours reads"
    ),
}
WORDS = (
    "the test is behind its release and calls it without `path`: a TypeError either way, which a "
    "wrapper words otherwise"
)
SILENT = (
    "its poller is a mock without an answer; ours asks the socket, which is a mock that has one"
)

ASCEND_AREAS = {
    "rotary": ("tests/ut/ops/test_rotary_embedding.py",),
    "attention": ("tests/ut/attention", "tests/ut/compilation"),
    "gdn": ("tests/ut/patch/worker/patch_common", "tests/ut/worker/test_block_table.py"),
    "kv": ("tests/ut/kv_connector", "tests/ut/distributed/mooncake"),
}

SUITES: dict[str, dict[str, Suite]] = {
    "vllm": {"0.18.0": VLLM_0_18},
    "vllm_ascend": {
        "0.18.0": Suite(
            distribution="vllm-ascend",
            areas=ASCEND_AREAS,
            differs={
                **MOCKED,
                f"{MOONCAKE}TestUtils::test_ensure_zmq_recv_success": WORDS,
                f"{MOONCAKE}TestUtils::test_ensure_zmq_recv_timeout": WORDS,
            },
        ),
        "0.13.0": Suite(
            distribution="vllm-ascend",
            areas=ASCEND_AREAS,
            differs={**MOCKED, f"{MOONCAKE}TestUtils::test_ensure_zmq_recv_timeout": SILENT},
        ),
    },
}
