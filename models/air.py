"""Attend, infer, repeat: how many digits are in the picture, where, and what they look like.

What: canvases of 20 x 20 with zero to two digits of 8 x 8. A step says whether there is another digit, where, and what
it is; the decoder draws it. Whether is a coin, the only site without a pathwise gradient: its strategy decides.
Source: Eslami et al., "Attend, Infer, Repeat", NeurIPS 2016; strategies as in Becker et al., PLDI 2024, figure 7.
Cost: 1000 steps about half a minute on two cores. Expected: the right count on 99 pictures in a hundred; plain score
gradients need several times as many steps for nine in ten. `tests/benchmarks/test_vi_air.py` compares.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax

import genkit as gk


SIZE = 20
PATCH = 8
STEPS = 2
WHAT = 8
NOISE = 0.25


def placement(where):
    """Bilinear weights (20, 8) along each axis for a patch whose corner is at `12 sigmoid(where)`."""
    corner = (SIZE - PATCH) * jax.nn.sigmoid(where)
    distance = jnp.arange(SIZE)[:, None] - corner[:, None, None] - jnp.arange(PATCH)
    rows, columns = jnp.maximum(0.0, 1.0 - jnp.abs(distance))
    return rows, columns


class AIR(eqx.Module):
    """Decoder, and the nets of the guide: one looks for the next digit, one looks at it."""

    decoder: eqx.nn.MLP
    search: eqx.nn.MLP
    look: eqx.nn.MLP

    def __init__(self, key):
        key_decoder, key_search, key_look = jax.random.split(key, 3)
        self.decoder = eqx.nn.MLP(WHAT, PATCH**2, 64, 1, jax.nn.gelu, key=key_decoder)
        self.search = eqx.nn.MLP(SIZE**2, 5, 128, 2, jax.nn.gelu, key=key_search)
        self.look = eqx.nn.MLP(PATCH**2, 2 * WHAT, 64, 1, jax.nn.gelu, key=key_look)

    def draw(self, present, where, what):
        """One digit on an empty canvas."""
        rows, columns = placement(where)
        patch = jax.nn.sigmoid(self.decoder(what) - 2.0).reshape(PATCH, PATCH)
        return present * (rows @ patch @ columns.T)

    def model(self, image):
        """The picture as a sum of digits and noise."""
        canvas = jnp.zeros((SIZE, SIZE))
        present = jnp.array(True)
        for i in range(STEPS):
            present = present & (numpyro.sample(f"present{i}", dist.Bernoulli(0.5).mask(present)) == 1)
            where = numpyro.sample(f"where{i}", dist.Normal(jnp.zeros(2), 1.5).to_event(1).mask(present))
            what = numpyro.sample(f"what{i}", dist.Normal(jnp.zeros(WHAT), 1.0).to_event(1).mask(present))
            canvas = canvas + self.draw(present, where, what)
        numpyro.sample("image", dist.Normal(canvas, NOISE).to_event(2), obs=image)

    def guide(self, image):
        """Digits one after the other, each from what the earlier ones leave unexplained."""
        rest = image
        present = jnp.array(True)
        for i in range(STEPS):
            found = self.search(rest.reshape(-1))
            coin = dist.Bernoulli(logits=found[0]).mask(present)
            present = present & (numpyro.sample(f"present{i}", coin) == 1)
            where_dist = dist.Normal(found[1:3], jnp.exp(found[3:5] - 2.0))
            where = numpyro.sample(f"where{i}", where_dist.to_event(1).mask(present))
            rows, columns = placement(where)
            loc, log_scale = jnp.split(self.look((rows.T @ rest @ columns).reshape(-1)), 2)
            what_dist = dist.Normal(loc, jnp.exp(log_scale - 1.0))
            what = numpyro.sample(f"what{i}", what_dist.to_event(1).mask(present))
            rest = rest - self.draw(present, where, what)


def pictures(key, num):
    """Canvases and how many digits are on each."""
    digits = jnp.asarray(gk.data.digits().x_train).reshape(-1, PATCH, PATCH) * 0.5 + 0.5

    def one(key):
        key_count, key_digit, key_corner = jax.random.split(key, 3)
        count = jax.random.randint(key_count, (), 0, STEPS + 1)
        chosen = digits[jax.random.randint(key_digit, (STEPS,), 0, digits.shape[0])]
        corners = jax.random.randint(key_corner, (STEPS, 2), 0, SIZE - PATCH + 1)
        canvas = jnp.zeros((SIZE, SIZE))
        for i in range(STEPS):
            placed = jax.lax.dynamic_update_slice(jnp.zeros((SIZE, SIZE)), chosen[i], tuple(corners[i]))
            canvas = canvas + jnp.where(i < count, placed, 0.0)
        return jnp.minimum(canvas, 1.0), count

    return jax.vmap(one)(jax.random.split(key, num))


def bound(strategy=None, num_particles=1, **options):
    """The objective: each picture has its own `E`, so that its coins are summed apart from the others'."""

    def loss(air, images, *, key):
        def one(image, key):
            p = gk.vi.program(air.model)(image)
            q = gk.vi.program(air.guide)(image)
            if strategy is not None:
                q = gk.vi.with_grad(q, {"present*": strategy})
            if num_particles == 1:
                return gk.vi.E(lambda: gk.vi.elbo(p, q, **options))(key=key)
            return gk.vi.E(lambda: gk.vi.iwelbo(p, q, num_particles), max_paths=64)(key=key)

        return -jnp.mean(jax.vmap(one)(images, jax.random.split(key, images.shape[0]))), {}

    return loss


@eqx.filter_jit
def count_accuracy(air, images, counts, key):
    """The share of pictures on which the guide draws the right number of digits."""

    def one(image, key):
        value, _ = gk.vi.program(air.guide)(image).sample(key=key)
        return value["present0"] * (1 + value["present1"])

    return jnp.mean(jax.vmap(one)(images, jax.random.split(key, images.shape[0])) == counts)


recipe = gk.Recipe(
    build=lambda key: AIR(key),
    data=gk.data.Batches(pictures(jax.random.key(0), 4096)[0], batch_size=64),
    phases=gk.Phase(bound(gk.vi.Enum()), optax.adam(1e-3)),
    num_steps=1000,
    name="attend, infer, repeat",
)
