"""One reader per structure: the tensors of one module, by role, into the adapter they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.errors import AmbiguousFileError, require_file
from peftkit.files.formats.patch import Patch
from peftkit.geometry import Shape

#: (module, rank or None where no factor has one) -> the options that make γ, and where they came from in words
Scale = Callable[[str, "int | None"], "tuple[dict[str, Any], str]"]

#: the parts of a LoHa and of a LoKr, after "hada_" and "lokr_"
LOHA_PARTS = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
LOKR_PARTS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def _lora(module: str, t: Mapping[str, Tensor], scale: Scale) -> Patch:
    _require(module, t, {"up", "down"}, {"mid"})
    up, down, mid = t["up"], t["down"], t.get("mid")
    require_file(2 <= down.dim() <= 5, module, f"lora_down of shape {tuple(down.shape)} is no layer's")
    require_file(up[0, 0].numel() == 1, module, "lora_up is a kernel larger than 1")
    B, rank = up.flatten(1), down.shape[0]
    require_file(B.shape[1] == rank, module, f"lora_up has {B.shape[1]} ranks, lora_down {rank}")
    options, words = scale(module, rank)
    options |= {"rank": rank}
    if mid is None:
        kernel = tuple(down.shape[2:])
        tensors = {"up": B, "down": down.flatten(1)}
        shape = Shape(B.shape[0], down.shape[1], kernel)
        return Patch("lora", options, shape, tensors, down.dim() > 2, scale=words)
    require_file(mid.shape[:2] == (rank, rank) and down[0, 0].numel() == 1, module, "lora_mid is not a core")
    tensors = {"up": B, "down": down.flatten(1), "core": mid.flatten(2)}
    shape = Shape(B.shape[0], down.shape[1], tuple(mid.shape[2:]))
    return Patch("lora", options | {"tucker": True}, shape, tensors, scale=words)


def _loha(module: str, t: Mapping[str, Tensor], scale: Scale) -> Patch:
    names = {f"hada_{half}_{side}" for half in ("w1", "w2") for side in ("a", "b")}
    _require(module, t, names, {"hada_t1", "hada_t2"})
    tucker = "hada_t1" in t
    require_file(tucker == ("hada_t2" in t), module, "one of hada_t1 and hada_t2 is missing")
    ups = [t[f"hada_{half}_a"].mT if tucker else t[f"hada_{half}_a"] for half in ("w1", "w2")]
    downs = [t[f"hada_{half}_b"] for half in ("w1", "w2")]
    rank = downs[0].shape[0]
    require_file(
        all(up.shape == (ups[0].shape[0], rank) for up in ups) and all(d.shape == downs[0].shape for d in downs),
        module,
        "its two products differ in rank or shape",
    )
    options, words = scale(module, rank)
    tensors = {"up1": ups[0], "down1": downs[0], "up2": ups[1], "down2": downs[1]}
    kernel: tuple[int, ...] = ()
    if tucker:
        options |= {"tucker": True}
        kernel = tuple(t["hada_t1"].shape[2:])
        tensors |= {"core1": t["hada_t1"].flatten(2), "core2": t["hada_t2"].flatten(2)}
    shape = Shape(ups[0].shape[0], downs[0].shape[1], kernel)
    return Patch("loha", options | {"rank": rank}, shape, tensors, tucker, scale=words)


def _lokr(module: str, t: Mapping[str, Tensor], scale: Scale) -> Patch:
    full, low_rank = {"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}
    small = {"lokr_w1"} if "lokr_w1" in t else {"lokr_w1_a", "lokr_w1_b"}
    _require(module, t, small | (full if "lokr_w2" in t else low_rank), {"lokr_t2"} if "lokr_w2_a" in t else set())
    C, C_left, C_right = t.get("lokr_w1"), t.get("lokr_w1_a"), t.get("lokr_w1_b")
    outer = C.shape if C is not None else (C_left.shape[0], C_right.shape[1])  # type: ignore[union-attr]
    if "lokr_w2" in t:
        D, rank = t["lokr_w2"], None if C_right is None else C_right.shape[0]
        kernel_known, kernel, channels, rows = D.dim() > 2, tuple(D.shape[2:]), D.shape[1], D.shape[0]
        tensors = {"block": D.flatten(1)}
    else:
        core, left, right = t.get("lokr_t2"), t["lokr_w2_a"], t["lokr_w2_b"]
        left = left if core is None else left.mT
        rank, rows, channels = right.shape[0], left.shape[0], right.shape[1]
        kernel_known, kernel = core is not None, () if core is None else tuple(core.shape[2:])
        tensors = {"left": left, "right": right} | ({} if core is None else {"core": core.flatten(2)})
    shape = Shape(outer[0] * rows, outer[1] * channels, kernel)
    options, words = scale(module, rank)
    if rank is not None:
        options |= {"rank": rank}
    options |= {"outer": (int(outer[0]), int(outer[1])), "full": "lokr_w2" in t}
    if "lokr_t2" in t:
        options |= {"tucker": True}
    # A small C in two factors of the other factor's rank trains as such; otherwise their product says the same ΔW
    if C_left is not None and C_right is not None and C_right.shape[0] == rank:
        options |= {"decompose_both": True}
        tensors |= {"outer_left": C_left, "outer_right": C_right}
    else:
        tensors["outer"] = C if C is not None else (C_left.float() @ C_right.float())  # type: ignore[union-attr]
    return Patch("lokr", options, shape, tensors, kernel_known, scale=words)


def _oft(module: str, t: Mapping[str, Tensor], scale: Scale) -> Patch:
    """Blocks A of kohya and LyCORIS: Q = A − Aᵀ, W' = Rᵀ·W on output rows, so this library's Q is Aᵀ − A."""
    _require(module, t, {"oft_blocks"}, {"rescale"})
    A = t["oft_blocks"]
    require_file(A.dim() in (3, 4) and A.shape[-1] == A.shape[-2], module, "oft_blocks are no square blocks")
    size = A.shape[-3] * A.shape[-1]
    require_file("rescale" not in t or t["rescale"].numel() == size, module, f"rescale has not {size} factors")
    if A.shape[-1] == 1:
        return _of_one_row(t, size)
    if A.dim() == 4:
        return _boft(t, scale(module, None))
    n, b, _ = A.shape
    i, j = torch.triu_indices(b, b, 1)
    bound, words = scale(module, None)
    options: dict[str, Any] = {"block_size": b} | bound
    tensors = {"skew": A[:, j, i] - A[:, i, j]}
    if "rescale" in t:
        options |= {"rescale": True}
        tensors["rescale"] = t["rescale"].flatten()
    return Patch("oft", options, Shape(n * b, 0), tensors, kernel_known=False, scale=words)


def _of_one_row(t: Mapping[str, Tensor], size: int) -> Patch:
    """Blocks of one row, as LyCORIS makes them of a prime number of rows: they rotate nothing, and rescale scales."""
    gate = t["rescale"].flatten().float() - 1 if "rescale" in t else torch.zeros(size)
    return Patch(
        "ia3", {"side": "out"}, Shape(size, 0), {"gate": gate}, False, scale="1: blocks of one row do not rotate"
    )


def _boft(t: Mapping[str, Tensor], constraint: tuple[dict[str, Any], str]) -> Patch:
    """Stages of blocks A, which LyCORIS applies untransposed: Q = A − Aᵀ."""
    A, (bound, words) = t["oft_blocks"], constraint
    stages, n, b, _ = A.shape
    i, j = torch.triu_indices(b, b, 1)
    options: dict[str, Any] = {"block_size": b, "stages": stages} | bound
    tensors = {"skew": A[..., i, j] - A[..., j, i]}
    if "rescale" in t:
        options |= {"rescale": True}
        tensors["rescale"] = t["rescale"].flatten()
    return Patch("boft", options, Shape(n * b, 0), tensors, kernel_known=False, scale=words)


def _full(module: str, t: Mapping[str, Tensor], scale: Scale) -> Patch:
    del scale
    _require(module, t, {"diff"}, set())
    M = t["diff"]
    shape = Shape(M.shape[0], M.shape[1], tuple(M.shape[2:]))
    return Patch("full", {}, shape, {"change": M.flatten(1)}, scale="1: the change itself")


def _glora_on_kernel(module: str, t: Mapping[str, Tensor], scale: Scale) -> Patch:
    """GLoRA of a kernel larger than 1, which LyCORIS alone writes: b2 (r, c, *kernel) has it, the others are of 1."""
    others = [t[name] for name in ("a1", "a2", "b1")]
    a1, a2, b1 = (tensor.flatten(1) for tensor in others)
    b2, (rank, channels, *kernel) = t["b2"].flatten(1), t["b2"].shape
    alone = all(tensor.numel() == tensor.shape[0] * tensor.shape[1] for tensor in others)
    require_file(alone, module, "only b2 of a GLoRA has a kernel")
    fits = a1.shape == (channels, rank) and a2.shape == (rank, channels) and b1.shape[1] == rank
    require_file(fits, module, "its factors do not go together")
    options, words = scale(module, rank)
    tensors = {"base_up": a1, "base_down": a2, "up": b1, "down": b2}
    return Patch("glora", options | {"rank": rank}, Shape(len(b1), channels, tuple(kernel)), tensors, scale=words)


def _glora(module: str, t: Mapping[str, Tensor], scale: Scale) -> Patch:
    """ΔW = γ(W·a1·a2 + b1·b2); the old layout, which A1111 reads, stores the factors of each product the other way."""
    _require(module, t, {"a1", "a2", "b1", "b2"}, set())
    if t["b2"][0, 0].numel() > 1:
        return _glora_on_kernel(module, t, scale)
    a1, a2, b1, b2 = (
        t[name].flatten(1) if t[name][0, 0].numel() == 1 else t[name] for name in ("a1", "a2", "b1", "b2")
    )
    require_file(all(x.dim() == 2 for x in (a1, a2, b1, b2)), module, "only b2 of a GLoRA has a kernel")
    new = a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0] and a1.shape[0] == b2.shape[1]
    old = a2.shape[1] == a1.shape[0] == b2.shape[1] == b1.shape[0] and a2.shape[0] == b1.shape[1]
    require_file(new or old, module, "its factors do not go together")
    if new and old and a1.shape[0] == a1.shape[1]:
        raise AmbiguousFileError(
            f"{module}: a GLoRA whose rank is the width of its weight can be read in two layouts; use a smaller rank"
        )
    if not new or (old and a1.shape[0] < a1.shape[1]):  # of a square weight both fit, and the rank is the smaller side
        a1, a2, b1, b2 = a2, a1, b2, b1
    rank = a1.shape[1]
    options, words = scale(module, rank)
    tensors = {"base_up": a1, "base_down": a2, "up": b1, "down": b2}
    return Patch("glora", options | {"rank": rank}, Shape(b1.shape[0], b2.shape[1]), tensors, False, scale=words)


def _ia3(module: str, t: Mapping[str, Tensor], scale: Scale) -> Patch:
    """LyCORIS' additive gate: ΔW = w∘W along outputs, or inputs where `on_input` says so."""
    del scale
    _require(module, t, {"ia3_weight", "on_input"}, set())
    require_file(t["on_input"].numel() == 1 and t["on_input"].item() in (0, 1), module, "on_input is not 0 or 1")
    gate, on_input = t["ia3_weight"].flatten(), bool(t["on_input"].item())
    shape = Shape(0, len(gate)) if on_input else Shape(len(gate), 0)
    side = "in" if on_input else "out"
    words = "1: IA3 has no alpha"
    return Patch("ia3", {"side": side}, shape, {"gate": gate}, kernel_known=False, scale=words, per_channel=on_input)


#: the roles of which any one tells the structure -> its reader
READERS: tuple[tuple[set[str], Callable[[str, Mapping[str, Tensor], Scale], Patch]], ...] = (
    ({"up", "down", "mid"}, _lora),
    ({f"hada_{part}" for part in LOHA_PARTS}, _loha),
    ({f"lokr_{part}" for part in LOKR_PARTS}, _lokr),
    ({"oft_blocks", "rescale"}, _oft),
    ({"diff"}, _full),
    ({"a1", "a2", "b1", "b2"}, _glora),
    ({"ia3_weight", "on_input"}, _ia3),
)


def decompose(module: str, inner: Patch, found: Mapping[str, Tensor], axis_given: str | None) -> Patch:
    """Put a DoRA around another adapter. The magnitudes' shape tells their axis: (rows, 1, …) or (1, channels, …).

    Args:
        module: its name, for errors.
        inner: the adapter inside.
        found: the magnitudes, by role.
        axis_given: the axis the user says, for a shape that does not tell it; None without.

    Raises:
        FileError: if the inner adapter depends on the base, or the magnitudes do not fit it.
        AmbiguousFileError: if the axis cannot be known.
    """
    require_file(
        not registry.get(inner.kind).needs_base(inner.options),
        module,
        f"a DoRA around {inner.kind}, whose change depends on the base, is not read",
    )
    require_file(len(found) == 1, module, "dora_scale and lora_magnitude_vector are both there, one was expected")
    ((role, vector),) = found.items()
    rows = inner.shape.rows
    per_output = vector.dim() > 1 and vector.numel() == vector.shape[0] == rows and rows > 1
    require_file(
        role != "magnitude" or vector.numel() == rows, module, f"{vector.numel()} magnitudes for {rows} outputs"
    )
    if role == "magnitude" or per_output:  # PEFT's is per output whatever its shape, (rows,) or (1, rows, 1, 1)
        axis = "out"
    elif vector.dim() > 1 and vector.numel() == vector.shape[1] and vector.shape[0] == 1 and rows > 1:
        axis = "in"
    elif vector.dim() == 1 and (vector.numel() == rows) != _may_be_channels(vector.numel(), inner):
        axis = "out" if vector.numel() == rows else "in"
    elif axis_given is not None:
        axis = axis_given
    else:
        raise AmbiguousFileError(
            f"{module}: dora_scale of shape {tuple(vector.shape)} on a {inner.shape} weight can be per output or per "
            "input; say which by dora_axis='out' or dora_axis='in'"
        )
    return _decomposed(inner, vector.flatten(), axis)


def _may_be_channels(size: int, inner: Patch) -> bool:
    """Whether the weight can have that many input channels; of a flattened kernel only their product is known."""
    return size == inner.shape.channels if inner.kernel_known else inner.shape.columns % size == 0


def _decomposed(inner: Patch, magnitude: Tensor, axis: str) -> Patch:
    options = {"inner": inner.kind, "axis": axis, **inner.options}
    tensors = {f"inner.{key}": tensor for key, tensor in inner.tensors.items()} | {"magnitude": magnitude}
    return Patch("dora", options, inner.shape, tensors, inner.kernel_known, scale=inner.scale)


def _require(module: str, t: Mapping[str, Tensor], needed: set[str], optional: set[str]) -> None:
    missing, extra = needed - set(t), set(t) - needed - optional
    require_file(not missing, module, f"{', '.join(sorted(missing))} is missing")
    require_file(not extra, module, f"{', '.join(sorted(extra))} does not belong there")
