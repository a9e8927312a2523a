"""GDNAttentionMetadataBuilder of one vLLM release, patched and not, on batches of many kinds.

    python gdn_builders.py ROOT RELEASE SEED

ROOT holds `vllm`, which is imported as it is. The release's own build and ours get the same batch,
with tensors of a device that cannot be read unseen (`gdn_remote`). Prints JSON: for each case what
differs between the two results, what is wrong with the chunk tables, and how often each build
waited for the device.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT, RELEASE, SEED = sys.argv[1:4]
sys.path.insert(0, ROOT)
CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.append(str(CHECKOUT))

import torch  # noqa: E402
from gdn_batches import DRAFTS, Case, drawn, fixed  # noqa: E402
from gdn_remote import DEVICE, Copies, Device, Remote, here  # noqa: E402
from vllm.v1.attention.backends import gdn_attn  # noqa: E402
from vllm.v1.kv_cache_interface import MambaSpec  # noqa: E402

from ascend_patch import _plan, _registry  # noqa: E402
from ascend_patch._seams import make  # noqa: E402
from ascend_patch._versions import Installed  # noqa: E402
from ascend_patch.impl import gdn_metadata  # noqa: E402
from ascend_patch.kernels.gdn import PinnedStaging  # noqa: E402

MAX_SEQS, BLOCK, SLOTS = 24, 16, 10_000
VERSION = tuple(map(int, RELEASE.split(".")))
Builder = gdn_attn.GDNAttentionMetadataBuilder


def layer_of() -> SimpleNamespace:
    """A layer whose slots are all in use; from 0.19 its caches are one tuple for all engines."""
    caches = tuple(Remote(torch.ones(SLOTS, *shape)) for shape in ((3, 2), (2, 2, 1)))
    return SimpleNamespace(kv_cache=caches if VERSION >= (0, 19) else [caches])


def emptied(builder: Builder) -> dict[str, list[list[int]]]:
    """For each layer and each of its caches the slots that hold something else than before."""
    layers = builder.vllm_config.compilation_config.static_forward_context
    found = {}
    for name, layer in layers.items():
        caches = layer.kv_cache if VERSION >= (0, 19) else layer.kv_cache[0]
        held = [cache.held.flatten(1) for cache in caches]
        # Emptied is zero throughout.
        assert all(bool(((x == 1).all(1) | (x == 0).all(1)).all()) for x in held)
        found[name] = [(x[:, 0] == 0).nonzero().flatten().tolist() for x in held]
    return found


def expected_empty(case: Case, table: torch.Tensor) -> list[int]:
    """The slots of requests that have one token and no context."""
    pairs = zip(case.tokens_of, case.context, strict=True)
    return sorted(int(table[n, 0]) for n, pair in enumerate(pairs) if pair == (1, 0))


def builder_of(case: Case) -> Builder:
    """A builder of the release, its buffers full of what nobody may read."""
    fields = {"mamba_cache_mode": case.mode} if VERSION >= (0, 15) else {}
    spec = MambaSpec(
        block_size=BLOCK,
        shapes=((1,), (1,)),
        dtypes=(torch.float32,),
        num_speculative_blocks=DRAFTS,
        **fields,
    )
    speculation = SimpleNamespace(num_speculative_tokens=DRAFTS, parallel_drafting=False)
    config = SimpleNamespace(
        speculative_config=speculation if case.drafts is not None else None,
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: case.graphs),
            max_capture_size=64,
            max_cudagraph_capture_size=64,
            static_forward_context={"layer": layer_of(), "another group's": layer_of()},
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS),
        cache_config=SimpleNamespace(mamba_cache_mode=case.mode),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        pad_for_cudagraph=lambda tokens: -(-tokens // 8) * 8,
    )
    builder = Builder(spec, ["layer"], config, DEVICE)
    for value in vars(builder).values():
        if isinstance(value, Remote):
            value.held.fill_(True if value.dtype == torch.bool else 77)
    gdn_metadata._staging[builder] = {DEVICE: PinnedStaging(DEVICE, transfer=Copies())}
    return builder


def batch_of(case: Case, generator: torch.Generator):
    """(CommonAttentionMetadata, accepted tokens, drafts), padding included."""
    requests = len(case.tokens_of) + case.padding
    lengths = torch.tensor([*case.tokens_of, *[0] * case.padding], dtype=torch.int32)
    context = torch.tensor([*case.context, *[0] * case.padding], dtype=torch.int32)
    starts = torch.zeros(requests + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    seq_lens = context + lengths
    columns = 40 if case.mode == "align" else DRAFTS + 1
    table = torch.randint(1, SLOTS, (requests, columns), generator=generator, dtype=torch.int32)
    tokens = max(case.tokens, int(starts[-1]))
    fields = {
        "query_start_loc": Remote(starts),
        "query_start_loc_cpu": starts.clone(),
        "seq_lens": Remote(seq_lens),
        "num_reqs": requests,
        "num_actual_tokens": tokens,
        "max_query_len": int(lengths.max()),
        "max_seq_len": int(seq_lens.max()),
        "block_table_tensor": Remote(table),
        "slot_mapping": Remote(torch.zeros(tokens, dtype=torch.int64)),
    }
    kept = "" if VERSION < (0, 13) else "_"
    fields[f"{kept}seq_lens_cpu"] = seq_lens.clone()
    fields[f"{kept}num_computed_tokens_cpu"] = context
    names = {field.name for field in dataclasses.fields(gdn_attn.CommonAttentionMetadata)}
    common = gdn_attn.CommonAttentionMetadata(**{k: v for k, v in fields.items() if k in names})
    if case.drafts is None:
        return common, None, None
    accepted = torch.randint(1, DRAFTS + 2, (requests,), generator=generator, dtype=torch.int32)
    drafts = torch.tensor([*case.drafts, *[-1] * case.padding], dtype=torch.int32)
    return common, Remote(accepted), drafts


def run(build, case: Case, generator: torch.Generator):
    """(metadata or the error's name, the builder, waits, slots of requests that begin)."""
    with Device() as device:
        builder = builder_of(case)
        batch = batch_of(case, generator)
        device.waits.clear()
        try:
            metadata = build(builder, 0, *batch)
        except AssertionError as error:
            return f"AssertionError: {error}", builder, device.waits, []
    # By the release's own table; in mode `align` that is a copy.
    slots = expected_empty(case, here(batch[0].block_table_tensor))
    return metadata, builder, device.waits, slots


def described(value: object, builder: Builder) -> object:
    """A field so that two are equal where layers cannot tell them apart."""
    if isinstance(value, torch.Tensor):
        held = here(value)
        buffers = {
            name: buffer.held.untyped_storage().data_ptr()
            for name, buffer in vars(builder).items()
            if isinstance(buffer, Remote)
        }
        owner = held.untyped_storage().data_ptr()
        return {
            "values": held.tolist(),
            "dtype": str(held.dtype),
            "device": str(value.device),
            "strides": held.stride() if held.numel() > 1 else None,
            "buffer": [name for name, pointer in buffers.items() if pointer == owner],
        }
    if isinstance(value, dict):
        return {key: described(part, builder) for key, part in value.items()}
    return value


def differences(theirs, ours) -> list[str]:
    (expected, their_builder), (found, our_builder) = theirs, ours
    if isinstance(expected, str) or isinstance(found, str):
        return [] if expected == found else [f"{expected!r} and {found!r}"]
    wrong = []
    for field in dataclasses.fields(expected):
        a = described(getattr(expected, field.name), their_builder)
        b = described(getattr(found, field.name), our_builder)
        if a != b and not by_design(field.name, a, b, found):
            wrong.append(f"{field.name}: {a} and {b}")
    return wrong


def by_design(name: str, a: object, b: object, found) -> bool:
    """Where ours is meant to differ, and does so in this way only."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return False
    known = {}
    if name.endswith("token_indx") and VERSION < (0, 13):
        # The release sorts by an unstable sort: each request's tokens in any order.
        known = {"values": sorted(a["values"])}
    if name == "spec_token_masks":
        # Behind its own tokens the release leaves what an earlier batch has written.
        count = found.num_spec_decode_tokens
        padding = [False] * (len(a["values"]) - count)
        known = {"values": a["values"][:count] + padding} if a["buffer"] else {}
    return {**a, **known} == b


def faults(case: Case, metadata) -> list[str]:
    """What is wrong with the tables, by the definition of each, a sequence at a time."""
    chunks = gdn_metadata.of(metadata)
    if not metadata.num_prefills:
        return [] if chunks is None else ["tables without prefill"]
    drafts = case.drafts or []
    speculates = sum(n for n in drafts if n > 0) > 0
    lengths = [
        n
        for i, n in enumerate([*case.tokens_of, *[0] * case.padding])
        if not (speculates and i < len(drafts) and drafts[i] >= 0)
    ]
    starts, indices, offsets, update_offsets, final = [0], [], [0], [0], []
    for number, length in enumerate(lengths):
        starts.append(starts[-1] + length)
        chunk = 0
        while chunk * 64 < length:
            indices.append([number, chunk])
            chunk += 1
        offsets.append(offsets[-1] + chunk)
        update_offsets.append(update_offsets[-1] + chunk + 1)
        final.append(update_offsets[-1] - 1)
    table = chunks.table(64)
    expected = {
        "starts": (list(chunks.starts), starts),
        "cu_seqlens": (here(chunks.cu_seqlens).tolist(), starts),
        "as the release has them": (here(metadata.non_spec_query_start_loc).tolist(), starts),
        "indices": (here(table.indices).tolist(), indices),
        "offsets": (here(table.offsets).tolist(), offsets),
        "update_offsets": (here(table.update_offsets).tolist(), update_offsets),
        "final_indices": (here(table.final_indices).tolist(), final),
    }
    wrong = [f"{name}: {got}, not {want}" for name, (got, want) in expected.items() if got != want]
    if not isinstance(chunks.cu_seqlens, Remote):
        wrong.append("tables are not on the device")
    return wrong


def main() -> None:
    """Decide as a server would, install the builder's target, run every case, take it back."""
    installed = Installed({"vllm": RELEASE}, {"vllm": Path(ROOT)}, "vllm", device="cuda")
    decision = _plan.decide(_registry.load()["gdn_attn"], installed)
    assert decision.band is not None, decision.reason
    original = Builder.build
    targets = [t for t in decision.band.targets if "GDNAttentionMetadataBuilder" in t.symbol]
    assert {t.symbol.rpartition(".")[2] for t in targets} == {"build", "__init__"}
    target = next(t for t in targets if t.symbol.endswith(".build"))
    installations = [make(t, lambda: None) for t in targets]
    for installation in installations:
        installation.prepare()
        installation.install()
    ours = Builder.build
    assert ours is not original
    rng = random.Random(int(SEED))
    cases = fixed(VERSION) + [drawn(rng, number, VERSION) for number in range(60)]
    found = []
    for number, case in enumerate(cases):
        generator = torch.Generator().manual_seed(int(SEED) + number)
        expected, their_builder, their_waits, _ = run(original, case, generator.clone_state())
        metadata, builder, waits, slots = run(ours, case, generator.clone_state())
        entry = {
            "name": case.name,
            "differs": differences((expected, their_builder), (metadata, builder)),
            "waits": dict(waits),
            "stock": dict(their_waits),
            "refused": expected if isinstance(expected, str) else "",
        }
        if not isinstance(metadata, str):
            entry["tables"] = faults(case, metadata)
            entry["prefills"] = metadata.num_prefills
            entry["decodes"] = metadata.num_decodes
            entry["speculative"] = metadata.num_spec_decodes
            entry["begin"] = slots
            entry["emptied"] = emptied(builder)
            entry["stock emptied"] = emptied(their_builder)
        found.append(entry)
    for installation in installations:
        installation.revert()
    assert Builder.build is original
    print(json.dumps({"target": target.replacement, "cases": found}))


if __name__ == "__main__":
    main()
