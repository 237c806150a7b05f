"""Block sizes of the attention kernels. A key is the dtype, the padded head size, and the kind of call or the sizes of its one tile."""

from __future__ import annotations

from cvmk.ops.triton import _tuning


def _pieces(width: int, dtype: str) -> _tuning.Config:
    """Of packed sequences of some tens of rows: a tile sees the keys of all its sequences, so that large tiles compute what is masked."""
    if dtype == "float32":
        return {"BLOCK_M": 32, "BLOCK_N": 32 if width <= 64 else 16, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 2 if width <= 64 else 4, "num_stages": 2}


def _forward_heuristic(key: str, capability: tuple[int, int]) -> _tuning.Config:
    dtype, width, kind = key.split(" ")
    d, wide = int(width[1:]), dtype == "float32"
    if kind == "few":
        return {"BLOCK_M": 16, "BLOCK_N": 32 if d > 128 or wide else 64, "num_warps": 4, "num_stages": 2 if d > 128 or wide else 3}
    if kind[0].isdigit():
        m, n = (int(size) for size in kind.split("x"))
        return {"BLOCK_M": m, "BLOCK_N": min(n, 32) if wide or d > 128 else n, "num_warps": max(1, min(4, m // 16)) if m * n < 4096 else 4, "num_stages": 1}
    if kind == "pieces":
        return _pieces(d, dtype)
    hopper = capability >= (9, 0)
    if wide:
        return {"BLOCK_M": 64 if d <= 64 else 32, "BLOCK_N": 32 if hopper and d <= 64 else 16, "num_warps": 4, "num_stages": 2}
    if kind == "extra":
        return {"BLOCK_M": 128 if d <= 64 else 64, "BLOCK_N": 64 if d <= 64 else 32, "num_warps": 8, "num_stages": 2}
    if d <= 64:
        return {"BLOCK_M": 128, "BLOCK_N": 128 if hopper else 64, "num_warps": 8, "num_stages": 3}
    if d <= 128:
        return {"BLOCK_M": 128, "BLOCK_N": 64 if hopper else 32, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128 if hopper else 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


def _forward_candidates(key: str, capability: tuple[int, int]) -> list[_tuning.Config]:
    kind = key.split(" ")[2]
    if kind == "pieces":
        return _blocks(key, capability)
    if kind == "few":
        return [{"BLOCK_M": 16, "BLOCK_N": n, "num_warps": w, "num_stages": s} for n in (32, 64, 128) for w in (2, 4) for s in (2, 3, 4)]
    if kind[0].isdigit():
        base = _forward_heuristic(key, capability)
        return [{**base, "num_warps": w} for w in (1, 2, 4, 8)]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s}
        for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)
    ]  # fmt: skip


def _query_heuristic(key: str, capability: tuple[int, int]) -> _tuning.Config:
    dtype, width, kind = key.split(" ")
    d, hopper = int(width[1:]), capability >= (9, 0)
    if kind == "pieces":
        return _pieces(d, dtype)
    if dtype == "float32":
        return {"BLOCK_M": 32, "BLOCK_N": 32 if d <= 64 else 16, "num_warps": 4, "num_stages": 1 if d > 128 else 2}
    long = kind == "long"
    if d <= 64:
        return {"BLOCK_M": 64 if hopper or long else 32, "BLOCK_N": 64 if hopper or long else 32, "num_warps": 4, "num_stages": 2}
    if d <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64 if long else 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128 if hopper else 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}


def _key_heuristic(key: str, capability: tuple[int, int]) -> _tuning.Config:
    dtype, width, kind = key.split(" ")
    d, hopper = int(width[1:]), capability >= (9, 0)
    rows = 64 if hopper and kind == "long" else 32
    if kind == "pieces":
        return _pieces(d, dtype)
    if dtype == "float32":
        return {"BLOCK_M": 16, "BLOCK_N": 32 if d <= 64 else 16, "num_warps": 4, "num_stages": 1 if d > 128 else 2}
    if d <= 64:
        return {"BLOCK_M": rows, "BLOCK_N": 64 if hopper or kind == "long" else 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": rows, "BLOCK_N": 64 if d <= 128 else 32, "num_warps": 8, "num_stages": 2 if d <= 128 else 1}


def _short_heuristic(key: str, capability: tuple[int, int]) -> _tuning.Config:
    m, n = (int(size) for size in key.split(" ")[2].split("x"))
    return {"num_warps": 4 if max(m, n) == 64 else 2, "num_stages": 1}


def _bias_heuristic(key: str, capability: tuple[int, int]) -> _tuning.Config:
    dtype, width, _ = key.split(" ")
    if dtype == "float32" or int(width[1:]) > 128:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if int(width[1:]) > 64:
        return {"BLOCK_M": 64 if capability >= (9, 0) else 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64 if capability >= (9, 0) else 32, "num_warps": 4, "num_stages": 1}


def _blocks(key: str, capability: tuple[int, int]) -> list[_tuning.Config]:
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s}
        for m in (32, 64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (1, 2, 3)
    ]  # fmt: skip


def _warps(key: str, capability: tuple[int, int]) -> list[_tuning.Config]:
    return [{"num_warps": w, "num_stages": 1} for w in (1, 2, 4, 8)]


FORWARD = _tuning.Tuned("attention_forward", _forward_heuristic, _forward_candidates)
QUERIES = _tuning.Tuned("attention_query_gradient", _query_heuristic, _blocks)
KEYS = _tuning.Tuned("attention_key_gradient", _key_heuristic, _blocks)
SHORT_BACKWARD = _tuning.Tuned("attention_short_backward", _short_heuristic, _warps)
BIAS = _tuning.Tuned("attention_bias_gradient", _bias_heuristic, _blocks)


# -- with distillation ---------------------------------------------------------------------------------------------------------------
def _distill_row_heuristic(key: str, capability: tuple[int, int]) -> _tuning.Config:
    """Of the passes over tiles of rows. Keys end on whether a student head is compared with one teacher head or with several."""
    dtype, width, *kind = key.split(" ")
    d, hopper = int(width[1:]), capability >= (9, 0)
    if dtype == "float32" or d > 128:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    warps = 4 if d <= 64 or hopper else 8
    return {"BLOCK_M": 64, "BLOCK_N": 64 if d <= 64 and hopper and kind != ["several"] else 32, "num_warps": warps, "num_stages": 2}


def _distill_key_heuristic(key: str, capability: tuple[int, int]) -> _tuning.Config:
    dtype, width, kind = key.split(" ")
    d, hopper = int(width[1:]), capability >= (9, 0)
    if dtype == "float32" or d > 128:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4 if d <= 64 and kind == "one" and hopper else 8, "num_stages": 2}


LOG_SUMS = _tuning.Tuned("distill_log_sums", _distill_row_heuristic, _blocks)
DISTILL_FORWARD = _tuning.Tuned("distill_forward", _distill_row_heuristic, _blocks)
DISTILL_QUERIES = _tuning.Tuned("distill_query_gradient", _distill_row_heuristic, _blocks)
DISTILL_KEYS = _tuning.Tuned("distill_key_gradient", _distill_key_heuristic, _blocks)
