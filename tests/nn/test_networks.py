"""Networks: shapes, conditions, zero start, vectorization, wrong input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk
from genkit.nn._unet import _Conv, _depth_to_space, _space_to_depth


nn = gk.nn
MAKE = {
    "MLP": lambda **kw: nn.MLP((1, 4, 4), width=16, depth=2, **kw),
    "DiT": lambda **kw: nn.DiT((1, 4, 4), width=16, depth=1, num_heads=2, **kw),
    "UNet": lambda **kw: nn.UNet((1, 4, 4), widths=(4, 8), num_heads=2, **kw),
}
each = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def awake(net):
    """The network with every zero matrix replaced: what begins as zero would hide everything else."""
    leaves, structure = jax.tree.flatten(net)
    keys = jr.split(jr.key(7), len(leaves))
    return jax.tree.unflatten(
        structure, [leaf + 0.3 * jr.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


@each
def test_begins_at_zero_and_has_a_static_shape(make):
    net = make(num_labels=3, key=jr.key(0))
    assert net.shape == (1, 4, 4) and net.num_labels == 3
    x = jr.normal(jr.key(1), (1, 4, 4))
    assert np.all(np.asarray(net(x, jnp.array(0.3), jnp.array(1))) == 0)
    assert awake(net)(x, jnp.array(0.3), jnp.array(1)).shape == x.shape


@each
def test_labels_and_their_absence(make):
    net, x, t = awake(make(num_labels=3, key=jr.key(0))), jr.normal(jr.key(1), (1, 4, 4)), jnp.array(0.3)
    run = eqx.filter_jit(lambda net, cond: net(x, t, cond))
    outputs = [np.asarray(run(net, jnp.array(label))) for label in (0, 1, 2, -1)]
    for i in range(4):
        for j in range(i):
            assert not np.allclose(outputs[i], outputs[j])
    np.testing.assert_allclose(run(net, None), outputs[3], rtol=1e-5, atol=1e-6)


@each
def test_vectors_and_their_absence(make):
    net, x, t = awake(make(cond_size=2, key=jr.key(0))), jr.normal(jr.key(1), (1, 4, 4)), jnp.array(0.3)
    assert net.num_labels is None
    run = eqx.filter_jit(lambda net, cond: net(x, t, cond))
    absent = run(net, jnp.array([jnp.nan, jnp.nan]))
    assert np.all(np.isfinite(absent))
    np.testing.assert_allclose(run(net, None), absent, rtol=1e-5, atol=1e-6)
    assert not np.allclose(run(net, jnp.array([1.0, 2.0])), absent)
    slope = eqx.filter_grad(lambda net: jnp.sum(net(x, t, jnp.array([jnp.nan, 1.0])) ** 2))(net)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))


@each
def test_a_batch_is_its_examples_and_everything_learns(make):
    net = awake(make(num_labels=3, key=jr.key(0)))
    x, t, cond = jr.normal(jr.key(1), (3, 1, 4, 4)), jnp.array([-1.5, 0.0, 1.1]), jnp.array([0, -1, 2])
    together = eqx.filter_jit(lambda net, *batch: jax.vmap(net)(*batch))(net, x, t, cond)
    one = eqx.filter_jit(net)
    for i in range(3):
        np.testing.assert_allclose(one(x[i], t[i], cond[i]), together[i], rtol=1e-4, atol=1e-5)
    slope = eqx.filter_jit(eqx.filter_grad(lambda net: jnp.sum(jax.vmap(net)(x, t, cond) ** 2)))(net)
    for path, leaf in jax.tree_util.tree_leaves_with_path(slope):
        assert np.any(np.asarray(leaf) != 0), f"{jax.tree_util.keystr(path)} gets no gradient"


@each
def test_time_matters_over_the_whole_range(make):
    net, x = awake(make(key=jr.key(0))), jr.normal(jr.key(1), (1, 4, 4))
    run = eqx.filter_jit(lambda t: net(x, t))
    # log(sigma) / 4 from sigma = 0.002 to 80, and times in [0, 1]: neighbors differ, nothing is periodic.
    outputs = np.stack([np.ravel(run(jnp.array(t))) for t in np.linspace(-1.6, 1.2, 15, dtype=np.float32)])
    gaps = np.abs(outputs[:, None] - outputs[None]).max(-1) + np.eye(15)
    assert gaps.min() > 1e-3


def test_convolution_against_scipy():
    from scipy.signal import correlate

    conv = _Conv(2, 3, key=jr.key(0))
    x = jr.normal(jr.key(1), (5, 6, 2))
    got = conv(x)
    for out in range(3):
        want = sum(
            correlate(np.asarray(x[..., c]), np.asarray(conv.weight[..., c, out]), mode="same") for c in range(2)
        )
        np.testing.assert_allclose(got[..., out], want, rtol=1e-4, atol=1e-5)


def test_resolution_changes_are_inverse():
    x = jnp.arange(32.0).reshape(4, 4, 2)
    assert _space_to_depth(x).shape == (2, 2, 8)
    np.testing.assert_array_equal(_depth_to_space(_space_to_depth(x)), x)


def test_unet_variants():
    for kwargs in ({"widths": (4,)}, {"widths": (4, 6, 8), "attention": False}, {"widths": (4, 8), "depth": 2}):
        net = nn.UNet((3, 8, 4), **{"num_heads": 2, **kwargs}, key=jr.key(0))
        assert eqx.filter_jit(awake(net))(jnp.ones((3, 8, 4)), jnp.array(0.1)).shape == (3, 8, 4)


def test_shift_of_the_input_shifts_the_unet():
    # Away from the border a U-Net without attention is equivariant to shifts by its coarsest step.
    net = awake(nn.UNet((1, 16, 16), widths=(4, 4), attention=False, key=jr.key(0)))
    x = jnp.zeros((1, 16, 16)).at[0, 7, 7].set(1.0)
    run = eqx.filter_jit(lambda x: net(x, jnp.array(0.2)))
    np.testing.assert_allclose(
        jnp.roll(run(x), (2, 2), (1, 2))[:, 8:10, 8:10], run(jnp.roll(x, (2, 2), (1, 2)))[:, 8:10, 8:10], atol=1e-4
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda k: nn.MLP((2,), width=0, key=k), "`width` must be an integer >= 2"),
        (lambda k: nn.MLP((2,), width=15, key=k), "`size` must be even"),
        (lambda k: nn.MLP((2,), num_labels=0, key=k), "`num_labels` must be an integer >= 1"),
        (lambda k: nn.MLP((2,), num_labels=2, cond_size=2, key=k), "given one at most"),
        (lambda k: nn.DiT((1, 8, 8), patch=3, key=k), "`patch` must be a divisor"),
        (lambda k: nn.DiT((1, 8, 8), width=30, num_heads=4, key=k), "`width` must be even and a multiple"),
        (lambda k: nn.UNet((1, 6, 6), widths=(4, 8, 8), key=k), "divisible by 4"),
        (lambda k: nn.UNet((1, 8, 8), widths=(4, 6), num_heads=4, key=k), "`num_heads` must be a divisor of 6"),
        (lambda k: nn.UNet((1, 8, 8), widths=(4, 5), key=k), "`widths` must be even"),
        (lambda k: nn.UNet((1, 8, 8), widths=(), key=k), "at least one level"),
    ],
)
def test_wrong_sizes(make, words):
    with pytest.raises(ValueError, match=words):
        make(jr.key(0))


def test_wrong_calls():
    labelled = nn.MLP((2,), width=4, depth=1, num_labels=3, key=jr.key(0))
    vector = nn.MLP((2,), width=4, depth=1, cond_size=2, key=jr.key(0))
    bare = nn.MLP((2,), width=4, depth=1, key=jr.key(0))
    x, t = jnp.ones(2), jnp.array(0.1)
    with pytest.raises(ValueError, match=r"`x` must be of shape \(2,\).*jax.vmap"):
        bare(jnp.ones(3), t)
    with pytest.raises(ValueError, match="`cond` must be None, because this network is unconditional"):
        bare(x, t, jnp.array(1))
    with pytest.raises(ValueError, match="`cond` must be one integer label"):
        labelled(x, t, jnp.array(0.5))
    with pytest.raises(ValueError, match="`cond` must be one integer label"):
        labelled(x, t, jnp.array([0, 1]))
    with pytest.raises(ValueError, match="`cond` must be a floating vector of length 2"):
        vector(x, t, jnp.ones(3))
    with pytest.raises(ValueError, match="`cond` must be a floating vector of length 2"):
        vector(x, t, jnp.array([1, 2]))
