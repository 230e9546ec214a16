"""What one call of a torch operator costs, in floating point operations (FLOPs).

Unit costs: add, subtract, multiply, compare 1; divide and square root 4; exp, log, trigonometric and special functions
8. These are the weights of the Livermore kernels, F. H. McMahon, "The Livermore Fortran Kernels: A Computer Test of the
Numerical Performance Range", 1986. The rest is built on them:

| operator | FLOPs |
|---|---|
| matrix products, convolutions | 2 a multiply-add (torch's own formulas) |
| fused attention | a visited pair 2 d + 2 d_v + 12, a query row 4 + d_v |
| softmax | 12 an element (maximum, subtract, exp, sum, scale) |
| reductions | 1 an element read; norms 2, logsumexp 11, logcumsumexp 18 |
| sort, argsort, unique, top-k | n log2 n comparisons a slice of length n |
| gather, index, scatter | 1 an element moved |
| FFT | 5 n log2 n a complex transform, half of it where one side is real |
| solves and factorizations | leading order, Golub & Van Loan, "Matrix Computations", 4th edition, 2013 |
| views, allocation, casts, copies, concatenation, padding | 0 |

A complex product costs 6 and a complex sum 2, so a complex multiply-add counts 8 where a real one counts 2.
An operator that has neither a formula, nor the tag `pointwise`, nor a place among the free ones is not known: the
counter reports it and never takes it for free.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

BASIC = 1
DIVISION = 4
TRANSCENDENTAL = 8
MOVE = 1
PAIR = 4 * BASIC + TRANSCENDENTAL  # scale, running maximum, subtract, sum, and the exponential

Number = int | float
Arguments = Mapping[str, object]
Formula = Callable[[Arguments, object], Number]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FREE = _names(
    """_assert_async _assert_tensor_metadata _conj_physical _efficientzerotensor _linalg_check_errors
    _local_scalar_dense _reshape_alias _reshape_copy _to_copy _unsafe_view alias_copy arange as_strided_scatter
    block_diag cat clone complex constant_pad_nd contiguous copy copy_ detach detach_ diag_embed diagonal_scatter
    empty empty_like empty_permuted empty_strided equal eye fill fill_ flip full full_like imag is_nonzero item lift
    lift_fresh_copy linspace new_empty new_empty_strided new_full new_ones new_zeros ones ones_like real
    reflection_pad1d repeat replication_pad1d resize_ resize_as_ roll scalar_tensor select_scatter set_
    slice_scatter split_with_sizes_copy squeeze_ stack swapaxes_ swapdims_ sym_numel sym_size t_ transpose_ tril
    tril_ tril_indices triu triu_ triu_indices unfold_copy unsqueeze_ zero zero_ zeros zeros_like"""
)
DIVISIONS = _names("div true_divide reciprocal sqrt rsqrt remainder fmod floor_divide hypot addcdiv gcd lcm")
TRANSCENDENTALS = _names(
    """acos acosh asin asinh atan atan2 atanh celu cos cosh digamma elu erf erfc erfinv exp exp2 expm1 float_power gelu
    i0 igamma igammac lgamma log log10 log1p log2 logaddexp logaddexp2 logit mish mvlgamma polygamma selu sigmoid silu
    sin sinc sinh softplus tan tanh xlogy angle"""
)


def _pointwise(name: str, arguments: Arguments, out: object) -> Number:
    """Cost of an elementwise operator: one unit cost an output element."""
    result = _first_tensor(out)
    if name == "pow":
        unit = _power(arguments["exponent"])
    elif name in TRANSCENDENTALS or name.startswith("special_"):
        unit = TRANSCENDENTAL
    else:
        unit = DIVISION if name in DIVISIONS else BASIC
    if result.is_complex():
        unit = 6 * BASIC if name == "mul" else 2 * unit
    return unit * result.numel()


def _power(exponent: object) -> int:
    if not isinstance(exponent, int | float):
        return TRANSCENDENTAL
    if float(exponent).is_integer() and 1 <= exponent <= 16:
        return max(1, math.ceil(math.log2(exponent))) * BASIC
    return DIVISION if exponent in (0.5, -0.5, -1) else TRANSCENDENTAL


def _first_tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    assert isinstance(value, tuple | list), f"an operator returned {type(value)}"
    return next(item for item in value if isinstance(item, Tensor))


def _tensor(arguments: Arguments, name: str) -> Tensor:
    value = arguments[name]
    assert isinstance(value, Tensor), f"argument {name} is {type(value)}"
    return value


def _torch_formula(func: torch._ops.OpOverload, arguments: Arguments, out: object) -> Number | None:
    """Torch's own formula (matrix products, convolutions), with complex multiply-adds at their cost; None if none."""
    packet = func.overloadpacket
    plain = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)
    formula = flop_registry.get(packet, flop_registry.get(plain))
    if formula is None:
        return None
    positional = [arguments[each.name] for each in func._schema.arguments if not each.kwarg_only]
    factor = 4 if _first_tensor(out).is_complex() else 1
    return factor * formula(*positional, out_val=out)


def attention_flops(pairs: int, rows: int, dim: int, value_dim: int) -> int:
    """FLOPs of fused attention that visits `pairs` (query, key) pairs in `rows` query rows, heads included."""
    return pairs * (2 * dim + 2 * value_dim + PAIR) + rows * (DIVISION + value_dim)


def visited_pairs(arguments: Arguments) -> int:
    """Pairs a fused kernel must visit: all, the causal triangle (top left), or those the additive mask leaves."""
    query, key = _tensor(arguments, "query"), _tensor(arguments, "key")
    (batch, heads, n, _), m = query.shape, key.shape[-2]
    visible = torch.ones(n, m, dtype=torch.bool, device=query.device)
    if arguments.get("is_causal"):
        visible = visible.tril()
    mask = arguments.get("attn_mask", arguments.get("attn_bias"))
    if isinstance(mask, Tensor):
        visible = visible & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
    return int(visible.expand(batch, heads, n, m).sum())


def _fused(arguments: Arguments, out: object) -> Number:
    query, value = _tensor(arguments, "query"), _tensor(arguments, "value")
    return attention_flops(visited_pairs(arguments), query[..., 0].numel(), query.shape[-1], value.shape[-1])


def _per_input(unit: Number) -> Formula:
    return lambda arguments, out: unit * _first_tensor(next(iter(arguments.values()))).numel()


def _per_output(unit: Number) -> Formula:
    return lambda arguments, out: unit * _first_tensor(out).numel()


def _per_source(unit: Number) -> Formula:
    """Per element written: the source or value tensor, or the index where the value is a scalar."""

    def cost(arguments: Arguments, out: object) -> Number:
        for name in ("src", "source", "values", "value", "index"):
            if isinstance(arguments.get(name), Tensor):
                return unit * _tensor(arguments, name).numel()
        return unit * _first_tensor(out).numel()

    return cost


def _sort(arguments: Arguments, out: object) -> Number:
    tensor = _first_tensor(next(iter(arguments.values())))
    dim = arguments.get("dim")
    length = tensor.numel() if dim is None or tensor.dim() == 0 else tensor.shape[dim]  # pyright: ignore
    return tensor.numel() * math.log2(max(length, 2)) * BASIC


def _search(arguments: Arguments, out: object) -> Number:
    boundaries = arguments.get("sorted_sequence", arguments.get("boundaries"))
    assert isinstance(boundaries, Tensor), "searchsorted without its sorted sequence"
    return _first_tensor(out).numel() * math.log2(max(boundaries.shape[-1], 2)) * BASIC


def _fft(arguments: Arguments, out: object) -> Number:
    tensor, result = _tensor(arguments, "self"), _first_tensor(out)
    larger = tensor if tensor.numel() >= result.numel() else result
    dims = arguments["dim"]
    assert isinstance(dims, list | tuple), "an FFT without its dimensions"
    length = math.prod(larger.shape[dim] for dim in dims)
    both_complex = tensor.is_complex() and result.is_complex()
    return (5.0 if both_complex else 2.5) * larger.numel() * math.log2(max(length, 2))


def _matrices(arguments: Arguments) -> tuple[int, int, int]:
    """(number of matrices, longer side, shorter side) of the first argument."""
    tensor = _first_tensor(next(iter(arguments.values())))
    rows, columns = tensor.shape[-2:]
    return math.prod(tensor.shape[:-2]), max(rows, columns), min(rows, columns)


def _per_matrix(cost: Callable[[int, int], Number]) -> Formula:
    def formula(arguments: Arguments, out: object) -> Number:
        count, longer, shorter = _matrices(arguments)
        return count * cost(longer, shorter)

    return formula


def _solve(per_column: Number, factor: Number) -> Formula:
    """`factor` n^3 a matrix and `per_column` n^2 a right-hand side."""

    def formula(arguments: Arguments, out: object) -> Number:
        matrix = next(iter(_tensor(arguments, name) for name in ("A", "LU", "input2", "self") if name in arguments))
        size = matrix.shape[-1]
        return factor * size**3 * math.prod(matrix.shape[:-2]) + per_column * size * _first_tensor(out).numel()

    return formula


def _svd(arguments: Arguments, out: object) -> Number:
    count, longer, shorter = _matrices(arguments)
    if arguments.get("compute_uv") is False:
        return count * (4 * longer * shorter**2 - 4 * shorter**3 / 3)
    return count * (14 * longer * shorter**2 + 8 * shorter**3)


def _sizes(arguments: Arguments) -> list[int]:
    return [value.numel() for value in arguments.values() if isinstance(value, Tensor)]


def _cdist(arguments: Arguments, out: object) -> Number:
    return (3 * _tensor(arguments, "x1").shape[-1] + DIVISION) * _first_tensor(out).numel()


FUSED = _names(
    """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps"""
)
_READS = _names(
    """sum mean amax amin aminmax max min argmax argmin any all prod cumsum cumprod cummax cummin _cummax_helper
    _cummin_helper count_nonzero histc bincount nonzero trace nansum avg_pool1d avg_pool2d _adaptive_avg_pool2d
    max_pool2d_with_indices multinomial"""
)
_GATHERS = _names("index _unsafe_index gather index_select take masked_select embedding repeat_interleave")
_SCATTERS = _names(
    """index_put _index_put_impl scatter scatter_add scatter_reduce index_add index_copy index_fill masked_scatter"""
)
_SORTS = _names("sort msort argsort topk kthvalue median nanmedian mode _unique2 unique_dim unique_consecutive")

FORMULAS: Mapping[str, Formula] = {
    **dict.fromkeys(FUSED, _fused),
    **dict.fromkeys(_READS, _per_input(BASIC)),
    **dict.fromkeys(_GATHERS, _per_output(MOVE)),
    **dict.fromkeys(_SCATTERS, _per_source(MOVE)),
    **dict.fromkeys(_SORTS, _sort),
    **dict.fromkeys(("searchsorted", "bucketize"), _search),
    **dict.fromkeys(("_fft_c2c", "_fft_r2c", "_fft_c2r"), _fft),
    **dict.fromkeys(("mv", "addmv"), lambda arguments, out: 2 * max(_sizes(arguments))),
    **dict.fromkeys(("dot", "vdot"), lambda arguments, out: 2 * max(_sizes(arguments))),
    **dict.fromkeys(("_softmax", "_safe_softmax"), _per_output(PAIR)),
    "_log_softmax": _per_output(PAIR),
    "logsumexp": _per_input(3 * BASIC + TRANSCENDENTAL),
    **dict.fromkeys(("logcumsumexp", "_logcumsumexp"), _per_input(2 * BASIC + 2 * TRANSCENDENTAL)),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _per_input(2 * BASIC)),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _per_input(4 * BASIC)),
    **dict.fromkeys(("allclose", "linalg_cross"), _per_input(3 * BASIC)),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _per_output(8 * BASIC)),
    **dict.fromkeys(_names("randn randn_like normal exponential"), _per_output(TRANSCENDENTAL)),
    **dict.fromkeys(_names("rand rand_like randint randperm uniform random bernoulli"), _per_output(BASIC)),
    "masked_fill": _per_output(BASIC),
    "addcmul": _per_output(2 * BASIC),
    "lerp": _per_output(3 * BASIC),
    "_cdist_forward": _cdist,
    "linalg_cholesky_ex": _per_matrix(lambda m, n: n**3 / 3),
    "cholesky": _per_matrix(lambda m, n: n**3 / 3),
    "linalg_lu_factor_ex": _per_matrix(lambda m, n: 2 * n**3 / 3),
    "_linalg_det": _per_matrix(lambda m, n: 2 * n**3 / 3),
    "_linalg_slogdet": _per_matrix(lambda m, n: 2 * n**3 / 3),
    "linalg_inv_ex": _per_matrix(lambda m, n: 2 * n**3),
    "linalg_matrix_exp": _per_matrix(lambda m, n: 20 * n**3),  # scaling and squaring, about ten products
    "linalg_qr": _per_matrix(lambda m, n: 4 * m * n**2 - 4 * n**3 / 3),
    "geqrf": _per_matrix(lambda m, n: 2 * m * n**2 - 2 * n**3 / 3),
    "linalg_householder_product": _per_matrix(lambda m, n: 2 * m * n**2 - 2 * n**3 / 3),
    "_linalg_eigh": _per_matrix(lambda m, n: 9 * n**3),
    "linalg_eig": _per_matrix(lambda m, n: 25 * n**3),
    "linalg_pinv": _per_matrix(lambda m, n: 14 * m * n**2 + 8 * n**3 + 2 * m * n**2),
    "linalg_lstsq": _per_matrix(lambda m, n: 2 * m * n**2 - 2 * n**3 / 3),
    "_linalg_svd": _svd,
    "_linalg_solve_ex": _solve(2, 2 / 3),
    "linalg_lu_solve": _solve(2, 0),
    "cholesky_solve": _solve(2, 0),
    "linalg_solve_triangular": _solve(1, 0),
    "triangular_solve": _solve(1, 0),
}


def cost(func: torch._ops.OpOverload, arguments: Arguments, out: object) -> Number | None:
    """FLOPs of one call, or None for an operator about which nothing is known.

    An operator that works in place (`add_`) costs what the other (`add`) costs.
    """
    name = func.overloadpacket.__name__
    plain = name if name in FORMULAS else name.removesuffix("_")
    if plain in FORMULAS:
        return FORMULAS[plain](arguments, out)
    # Some operators in place lack the tag that the others have.
    other = getattr(getattr(torch.ops.aten, plain, None), func._overloadname, func)
    if torch.Tag.pointwise in [*func.tags, *other.tags] or plain in DIVISIONS | TRANSCENDENTALS:
        return _pointwise(plain, arguments, out)
    return _torch_formula(func, arguments, out)
