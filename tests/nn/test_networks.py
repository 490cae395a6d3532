"""Networks: shapes, conditions, zero start, vectorization, wrong input."""

import functools

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


def awake(net):
    """The network with every zero matrix replaced: what begins as zero would hide everything else."""
    random = np.random.RandomState(7)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * random.randn(*leaf.shape), leaf.dtype), net)


def program(net, x, t, cond):
    """All that the tests look at, in one compilation: a batch, one example with and without a condition, a gradient."""
    last = jax.tree.map(lambda leaf: leaf[-1], (x, t, cond))
    slope = eqx.filter_grad(lambda net: jnp.sum(jax.vmap(net)(x, t, cond) ** 2))(net)
    return jax.vmap(net)(x, t, cond), net(*last), net(last[0], last[1], None), slope


TIMES = np.linspace(-1.6, 1.2, 15, dtype=np.float32)  # log(sigma) / 4 from sigma = 0.002 to 80, and times in [0, 1]


@functools.cache
def evaluated(name):
    """The program on a network conditioned on three labels: the times, then all labels at one time, then none."""
    net = MAKE[name](num_labels=3, key=jr.key(0))
    t = jnp.concatenate([TIMES, jnp.full(4, 0.3)])
    cond = jnp.concatenate([jnp.zeros(15, jnp.int32), jnp.array([0, 1, 2, -1])])
    x = jnp.broadcast_to(jr.normal(jr.key(1), (1, 4, 4)), (19, 1, 4, 4))
    run = eqx.filter_jit(program)
    return net, run(net, x, t, cond), run(awake(net), x, t, cond)


each = pytest.mark.parametrize("name", MAKE)


@each
def test_begins_at_zero_and_has_a_static_shape(name):
    net, (start, *_), (batch, *_) = evaluated(name)
    assert net.shape == (1, 4, 4) and net.num_labels == 3
    assert np.all(np.asarray(start) == 0)
    assert batch.shape == (19, 1, 4, 4) and np.all(np.isfinite(batch))


@each
def test_labels_and_their_absence(name):
    _, _, (batch, one, none, _) = evaluated(name)
    labeled = np.asarray(batch[15:])
    gaps = np.abs(labeled[:, None] - labeled[None]).max((-1, -2, -3)) + np.eye(4)
    assert gaps.min() > 1e-2
    np.testing.assert_allclose(one, batch[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(none, batch[-1], rtol=1e-4, atol=1e-5)


@each
def test_everything_learns(name):
    _, _, (*_, slope) = evaluated(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(slope):
        leaf = np.asarray(leaf)
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), f"{jax.tree_util.keystr(path)} gets no gradient"


@each
def test_times_are_told_apart_over_the_whole_range(name):
    _, _, (batch, *_) = evaluated(name)
    over = np.asarray(batch[:15])
    gaps = np.abs(over[:, None] - over[None]).max((-1, -2, -3)) + np.eye(15)
    assert gaps.min() > 1e-3


def test_vectors_and_their_absence():
    net = awake(nn.MLP((2,), width=8, depth=1, cond_size=2, key=jr.key(0)))
    assert net.num_labels is None
    cond = jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [jnp.nan, jnp.nan]])
    batch, one, none, slope = eqx.filter_jit(program)(net, jnp.ones((3, 2)), jnp.full(3, 0.3), cond)
    np.testing.assert_allclose(batch[1:], jnp.stack([one, none]), rtol=1e-5, atol=1e-6)
    assert not np.allclose(batch[0], none)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(slope))
    embed = nn.ConditionEmbedding(4, cond_size=1, key=jr.key(0))
    np.testing.assert_allclose(embed(jnp.array(0.1), jnp.array(2.0)), embed(jnp.array(0.1), jnp.array([2.0])))


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
    for kwargs in ({"widths": (4,)}, {"widths": (2, 4, 6), "attention": False, "depth": 2}):
        net = nn.UNet((3, 8, 4), **kwargs, key=jr.key(0))
        output = jax.eval_shape(lambda x, net=net: net(x, jnp.array(0.1)), jnp.ones((3, 8, 4)))
        assert output.shape == (3, 8, 4)
        assert (net.middle is None) == (not kwargs.get("attention", True))


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
    labeled = nn.MLP((2,), width=4, depth=1, num_labels=3, key=jr.key(0))
    vector = nn.MLP((2,), width=4, depth=1, cond_size=2, key=jr.key(0))
    bare = nn.MLP((2,), width=4, depth=1, key=jr.key(0))
    x, t = jnp.ones(2), jnp.array(0.1)
    with pytest.raises(ValueError, match=r"`x` must be of shape \(2,\).*jax.vmap"):
        bare(jnp.ones(3), t)
    with pytest.raises(ValueError, match="`cond` must be None, because this network is unconditional"):
        bare(x, t, jnp.array(1))
    with pytest.raises(ValueError, match="`cond` must be one integer label"):
        labeled(x, t, jnp.array(0.5))
    with pytest.raises(ValueError, match="`cond` must be one integer label"):
        labeled(x, t, jnp.array([0, 1]))
    with pytest.raises(ValueError, match="`cond` must be a floating vector of length 2"):
        vector(x, t, jnp.ones(3))
    with pytest.raises(ValueError, match="`cond` must be a floating vector of length 2"):
        vector(x, t, jnp.array([1, 2]))
