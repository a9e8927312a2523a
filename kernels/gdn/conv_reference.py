"""The convolutions in torch: float32 arithmetic, all sequences at once.

Products and sums are separate operations in one order, so that a token has the same bits whatever
batch it comes in. Nothing here reads device memory, but for starts that the host does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from ascend_patch.kernels.gdn.conv import Call, UpdateCall


def run(call: Call) -> None:
    """Any call that `conv.causal_conv1d` accepts."""
    if call.metadata is not None:
        starts = np.asarray(call.metadata.starts)
    else:
        starts = np.asarray(call.starts.tolist())
    tokens, before = int(starts[-1]), call.weight.shape[1] - 1
    lengths, device = np.diff(starts), call.x.device
    sequences = len(lengths)
    if not tokens:
        return

    def there(x: object) -> Tensor:
        return torch.as_tensor(x, device=device)

    # Each sequence with what lies before it: one row after the other, `before` and then its own.
    own = there(np.arange(tokens) + before * np.repeat(np.arange(1, sequences + 1), lengths))
    first = there(starts[:-1] + before * np.arange(sequences))
    rows = torch.zeros(
        tokens + before * sequences, call.x.shape[1], dtype=torch.float32, device=device
    )
    rows.index_copy_(0, own, call.x[:tokens].float())
    slots, kept = _slots(call.state_indices, sequences, device)
    at = first[:, None] + torch.arange(before, device=device)
    if call.conv_state is not None:
        wanted = kept
        if call.has_initial_state is not None:
            wanted = kept & call.has_initial_state[:sequences]
        held = call.conv_state.transpose(1, 2)[slots, :before].float()
        rows[at] = torch.where(wanted[:, None, None], held, 0.0)
    sums = _convolve(rows, call.weight, call.bias, call.silu).to(call.out.dtype)
    named = kept[there(np.repeat(np.arange(sequences), lengths))][:, None]
    result = sums.index_select(0, own - before)
    other = result.new_zeros(()) if call.fill else call.out[:tokens]
    torch.where(named, result, other, out=call.out[:tokens])
    if call.conv_state is not None:
        last = rows[at + there(lengths)[:, None]]
        places = torch.arange(before, device=device).expand(sequences, before)
        _write(call.conv_state, slots, places, last, (kept & there(lengths > 0))[:, None])


def run_update(call: UpdateCall) -> None:
    """Any call that `conv.causal_conv1d_update` accepts."""
    device, before = call.x.device, call.weight.shape[1] - 1
    if not call.sequences or not call.x.shape[0]:
        return
    places = call.conv_state.shape[2]
    one = torch.arange(call.sequences + 1, device=device)
    starts = one if call.starts is None else call.starts[: call.sequences + 1].long()
    lengths = starts.diff()
    most = _longest(call, lengths)
    slots, kept = _slots(call.state_indices, call.sequences, device, call.pad_slot_id)
    begin = torch.zeros_like(lengths)
    if call.num_accepted_tokens is not None:
        begin = call.num_accepted_tokens[: call.sequences].long() - 1
        begin = begin.clamp(0, places - before)
    held = begin[:, None] + torch.arange(before, device=device)
    t = torch.arange(most, device=device)
    tokens = (starts[:-1, None] + t).clamp(max=call.x.shape[0] - 1)
    # [N, before + most, C]: what each sequence remembers, and its tokens.
    past = call.conv_state.transpose(1, 2)[slots[:, None], held]
    rows = torch.cat((past.float(), call.x[tokens].float()), 1)
    sums = _convolve(rows.transpose(0, 1), call.weight, call.bias, call.silu).transpose(0, 1)
    inside = t < lengths[:, None]
    named = (inside & kept[:, None])[..., None]
    sums = torch.where(named, sums, 0.0).to(call.out.dtype)
    if call.starts is None:
        other = sums.new_zeros(()) if call.fill else call.out
        torch.where(named[:, 0], sums[:, 0], other, out=call.out)
    else:
        # Tokens that are not there are put where the padded ones of a spare row go.
        spare = torch.cat((call.out, call.out[:1]))
        to = torch.where(named[..., 0], starts[:-1, None] + t, call.out.shape[0])
        spare[to.flatten()] = sums.flatten(0, 1)
        call.out.copy_(spare[:-1])
    if call.num_accepted_tokens is None:
        to = torch.arange(before, device=device).expand(call.sequences, before)
        source, written = to + lengths[:, None], torch.ones_like(to, dtype=torch.bool)
    else:
        to = torch.arange(min(before - 1 + most, places), device=device)
        to = to.expand(call.sequences, len(to))
        source, written = to + 1, to < before - 1 + lengths[:, None]
    value = rows[torch.arange(call.sequences, device=device)[:, None], source]
    written = written & (kept & (lengths > 0))[:, None]
    _write(call.conv_state, slots, to, value, written)


def _longest(call: UpdateCall, lengths: Tensor) -> int:
    """Tokens of the longest sequence; a device is read only where nobody said."""
    if call.starts is None:
        return 1
    if call.max_query_len > 0 and call.x.device.type != "cpu":
        return call.max_query_len
    return max(int(lengths.max()), 1)


def _slots(
    indices: Tensor | None, sequences: int, device: torch.device, pad: int = -1
) -> tuple[Tensor, Tensor]:
    """Each sequence's slot, padding's moved to 0, and whether it has one."""
    if indices is None:
        slots = torch.arange(sequences, device=device)
        return slots, torch.ones_like(slots, dtype=torch.bool)
    slots = indices[:sequences].long()
    kept = (slots >= 0) & (slots != pad)
    return torch.where(kept, slots, 0), kept


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """[R, .., C] -> [R - W + 1, .., C]."""
    width = weight.shape[1]
    count = rows.shape[0] - width + 1
    # A tap's channels side by side, as a row's are.
    taps = weight.float().t().contiguous()
    total = rows[:count] * taps[0]
    if bias is not None:
        total += bias.float()
    product = torch.empty_like(total)
    for j in range(1, width):
        total += torch.mul(rows[j : j + count], taps[j], out=product)
    return functional.silu(total, inplace=True) if silu else total


def _write(state: Tensor, slots: Tensor, places: Tensor, value: Tensor, written: Tensor) -> None:
    """state[slots[n], :, places[n, k]] = value[n, k], where written [N, K]; without a read.

    Entries that are not to be written repeat one that is, or write what is there.
    """
    # Rows of channels, which is how caches lie in memory.
    state = state.transpose(1, 2)
    written = written.expand(places.shape).flatten()
    value = value.flatten(0, 1).to(state.dtype)
    slots = slots[:, None].expand(places.shape).flatten()
    some = written.to(torch.int32).argmax()
    source = torch.where(written, torch.arange(len(written), device=state.device), some)
    slots, places = slots[source], places.flatten()[source]
    value = torch.where(written.any(), value[source], state[slots, places])
    state[slots, places] = value
