"""Attention of one new token a row over a static cache, for the built-in PyTorch engine (needs nothing but torch).

On a GPU: flash-decoding. Each program reads one KV head's share of one row's cache for all query heads of its group;
the shares are then joined by their log-sum-exp. How far the cache is filled is read on the device, so that one CUDA
graph serves all contexts. Elsewhere, and for head sizes that are no power of two: PyTorch's own, under a mask.
"""

from typing import Any

import torch
from torch.nn import functional as F

try:
  import triton
  import triton.language as tl
except ImportError:  # a PyTorch for CPUs comes without
  triton = None

_BLOCK = 64  # cache slots that a program reads at once
_MIN_GROUP = 16  # rows of the smallest product that tensor cores take
_PROGRAMS_PER_SM = 2

if triton is not None:

  @triton.jit
  def _shares(  # type: ignore[no-untyped-def, unused-ignore]
    q_ptr,  # [B, K * GROUP, H]
    k_ptr,  # [B, K, slots, H]
    v_ptr,
    out_ptr,  # [B, K * GROUP, splits, H], fp32
    lse_ptr,  # [B, K * GROUP, splits]
    length_ptr,  # [B]
    scale,
    slots,
    splits,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
  ):
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # pair: row * K + KV head
    length = tl.load(length_ptr + pair // KV).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, length)
    g, h, s = tl.arange(0, ROWS), tl.arange(0, H), tl.arange(0, BLOCK)
    q = tl.load(q_ptr + (pair * GROUP + g[:, None]) * H + h[None, :], mask=g[:, None] < GROUP, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, H], tl.float32)
    for at in range(begin, end, BLOCK):
      inside = at + s < end
      place = pair * slots * H + (at + s[:, None]) * H + h[None, :]
      k = tl.load(k_ptr + place, mask=inside[:, None], other=0.0)
      v = tl.load(v_ptr + place, mask=inside[:, None], other=0.0)
      score = tl.where(inside[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -1e30)
      higher = tl.maximum(top, tl.max(score, 1))
      weight, kept = tl.exp(score - higher[:, None]), tl.exp(top - higher)
      total = total * kept + tl.sum(weight, 1)
      found = found * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
      top = higher
    row = (pair * GROUP + g) * splits + split
    # A share that is empty counts for nothing: its log-sum-exp is all but minus infinity.
    tl.store(
      out_ptr + row[:, None] * H + h[None, :], found / tl.maximum(total, 1e-30)[:, None], mask=g[:, None] < GROUP
    )
    tl.store(lse_ptr + row, tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-30)), -1e30), mask=g < GROUP)


def has_kernel(head_dim: int) -> bool:
  """Whether the kernel is there and takes heads of this size."""
  return triton is not None and 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0


def splits_of(batch: int, kv_heads: int, slots: int, processors: int) -> int:
  """Shares of each row's cache, so that all multiprocessors read."""
  return max(1, min(-(-slots // (4 * _BLOCK)), _PROGRAMS_PER_SM * processors // (batch * kv_heads)))


def flash_decode(
  q_BNH: torch.Tensor, k_BKSH: torch.Tensor, v_BKSH: torch.Tensor, length_B: torch.Tensor, splits: int
) -> torch.Tensor:
  """As `masked_decode`, by the kernel."""
  (batch, heads, size), (_, kv_heads, slots, _) = q_BNH.shape, k_BKSH.shape
  group = heads // kv_heads
  out = torch.empty(batch, heads, splits, size, dtype=torch.float32, device=q_BNH.device)
  lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q_BNH.device)
  meta: dict[str, Any] = {"GROUP": group, "ROWS": max(_MIN_GROUP, triton.next_power_of_2(group))}
  meta |= {"H": size, "BLOCK": _BLOCK, "KV": kv_heads}
  grid = (batch * kv_heads, splits)
  _shares[grid](q_BNH, k_BKSH, v_BKSH, out, lse, length_B, size**-0.5, slots, splits, **meta)
  return join(out, lse, q_BNH.dtype)


def join(out_BNPH: torch.Tensor, lse_BNP: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
  """The attention over the whole cache from that over its shares P."""
  if out_BNPH.shape[2] == 1:
    return out_BNPH[:, :, 0].to(dtype)
  return (out_BNPH * torch.softmax(lse_BNP, -1)[..., None]).sum(2).to(dtype)


def masked_decode(
  q_BNH: torch.Tensor, k_BKSH: torch.Tensor, v_BKSH: torch.Tensor, length_B: torch.Tensor
) -> torch.Tensor:
  """Attention [B, N, H] of one token a row over the first `length_B` of its S cache slots."""
  slots = torch.arange(k_BKSH.shape[2], device=q_BNH.device)
  mask = (slots[None] < length_B[:, None])[:, None, None]
  grouped = q_BNH.shape[1] != k_BKSH.shape[1]
  return F.scaled_dot_product_attention(q_BNH[:, :, None], k_BKSH, v_BKSH, attn_mask=mask, enable_gqa=grouped)[:, :, 0]
