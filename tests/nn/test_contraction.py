"""Flat factors against the contraction of the merged kernel, for every kind of layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import LoRAPair
from lowrank_optax.nn import Contraction, KernelAxes, lora_apply
from lowrank_optax.nn.functional import merge_kernel

EINSUMS = {
    "dense": ("...i,io->...o", (2, 3, 4), (4, 5)),
    "dense, no token axis": ("...i,io->...o", (4,), (4, 5)),
    "ellipsis inside": ("b...i,io->b...o", (2, 3, 6, 4), (4, 5)),
    "ellipsis moves": ("b...i,io->...bo", (2, 3, 6, 4), (4, 5)),
    "attention query": ("BTD,NDH->BTNH", (2, 3, 4), (2, 4, 5)),
    "attention query, square": ("BTD,NDH->BTNH", (2, 3, 4), (4, 4, 4)),
    "attention output": ("BTNH,NHD->BTD", (2, 3, 2, 4), (2, 4, 5)),
    "fused key and value": ("BSD,CKDH->CBSKH", (2, 3, 4), (2, 3, 4, 5)),
    "kernel transposed": ("td,fd->tf", (3, 4), (5, 4)),
    "output first": ("td,df->ft", (3, 4), (4, 5)),
    "contracted axes apart": ("hbd,dfh->bf", (3, 2, 4), (4, 5, 3)),
    "tokens permuted": ("btd,df->tbf", (2, 3, 4), (4, 5)),
    "experts first": ("ETD,EDF->ETF", (3, 2, 4), (3, 4, 5)),
    "experts inside": ("BTED,EDF->BTEF", (2, 6, 3, 4), (3, 4, 5)),
    "experts last in the kernel": ("BTED,DFE->BTFE", (2, 6, 3, 4), (4, 5, 3)),
    "experts without tokens": ("ED,EDF->EF", (3, 4), (3, 4, 5)),
    "two batch axes": ("gbehd,hedf->gbefh", (2, 3, 2, 3, 4), (3, 2, 4, 5)),
}


def check_flat_factors_act_as_the_merged_kernel(contraction, layer, x_shape, kernel_shape):
    """Compares adapter and merged kernel; ``layer(x, kernel)`` is the layer without adapter."""
    axes = contraction.kernel_axes
    batch, n_in, n_out = axes.sizes(kernel_shape)
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    pair = LoRAPair(draw(*batch, n_in, 2), draw(*batch, 2, n_out))
    x, kernel = draw(*x_shape), draw(7, *kernel_shape)

    @jax.jit  # one compilation instead of one for each operation
    def compute(x, kernel, pair):
        flat = lora_apply(contraction.flatten_input(x), pair, 0.5)
        y = contraction.unflatten_output(flat, x_shape, kernel_shape) + layer(x, kernel[3])
        oracle = layer(x, merge_kernel(kernel[3], pair, 0.5, axes))
        matrix = axes.to_matrix(kernel)
        back = axes.from_matrix(matrix, kernel.shape)
        return y, oracle, matrix, back, axes.to_matrix(kernel[3])

    y, oracle, matrix, back, third = compute(x, kernel, pair)
    np.testing.assert_allclose(y, oracle, atol=1e-4)
    # Layers stacked in front of the described axes are batch.
    assert axes.stack_shape(kernel.shape) == (7,)
    assert matrix.shape == (7, *batch, n_in, n_out)
    np.testing.assert_array_equal(back, kernel)
    np.testing.assert_array_equal(matrix[3], third)


@pytest.mark.parametrize(("einsum", "x_shape", "kernel_shape"), EINSUMS.values(), ids=EINSUMS)
def test_einsum_layouts(einsum, x_shape, kernel_shape):
    check_flat_factors_act_as_the_merged_kernel(
        Contraction.from_einsum(einsum), partial(jnp.einsum, einsum), x_shape, kernel_shape
    )


@pytest.mark.parametrize(
    ("x_shape", "axis", "batch_axes", "out"),
    [
        ((2, 3, 4), (-1,), (), (5,)),
        ((2, 3, 4), (-2, -1), (), (5, 6)),
        ((2, 3, 4), (-1, -2), (), (5,)),  # flax sorts the axes
        ((2, 3, 4), (1, -1), (), (5,)),
        ((2, 3, 4), (0,), (), (5,)),
        ((2, 3, 4), (-1,), (0,), (5, 2)),
        ((2, 3, 6, 4), (-2,), (0, 1), (5,)),
    ],
)
def test_dense_general_layouts(x_shape, axis, batch_axes, out):
    ndim = len(x_shape)
    contracted = tuple(sorted(i % ndim for i in axis))
    kernel_shape = (*(x_shape[i] for i in (*batch_axes, *contracted)), *out)
    contraction = Contraction.from_dense_general(ndim, axis, batch_axes, len(out))
    n_batch = len(batch_axes)
    assert contraction.kernel_axes == KernelAxes.in_order(n_batch, len(axis), len(out))
    in_kernel = tuple(range(n_batch, n_batch + len(axis)))
    numbers = ((contracted, in_kernel), (batch_axes, tuple(range(n_batch))))
    layer = partial(jax.lax.dot_general, dimension_numbers=numbers)
    check_flat_factors_act_as_the_merged_kernel(contraction, layer, x_shape, kernel_shape)


def test_token_axes_stay_apart_where_matmul_allows():
    contraction = Contraction.from_einsum("BTD,DF->BTF")
    assert contraction.flatten_input(jnp.zeros((2, 3, 4))).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("einsum", "message"),
    [
        ("td,dfk->tf", "kernel labels that are summed out: .'k'"),
        ("btd,df->bf", "input labels that are summed out: .'t'"),
        ("...d,df->f", "input labels that are summed out"),
        ("td,df->tfz", "come from nowhere: .'z'"),
        ("...d,...df->...f", "ellipsis in the kernel"),
        ("tdd,df->tf", "twice in one operand: .'d'"),
        ("td,d->td", "a contracted axis and an output axis"),
        ("td,d->t", "a contracted axis and an output axis"),
        ("td,df", "not of the form"),
        ("td->td", "not of the form"),
        ("td,df,fg->tg", "not of the form"),
    ],
)
def test_other_einsums_are_refused(einsum, message):
    with pytest.raises(ValueError, match=message):
        Contraction.from_einsum(einsum)


def test_shapes_that_do_not_fit_are_refused():
    axes = KernelAxes.in_order(0, 1, 2)
    with pytest.raises(ValueError, match="fewer than 3 axes"):
        axes.sizes((4, 5))
    with pytest.raises(ValueError, match=r"needs \(4, 6\)"):
        axes.from_matrix(jnp.zeros((6, 4)), (4, 2, 3))
    with pytest.raises(ValueError, match="the input has 2 axes"):
        Contraction.from_einsum("BTD,DF->BTF").flatten_input(jnp.zeros((3, 4)))
