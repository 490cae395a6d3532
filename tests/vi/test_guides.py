"""Automatic guides: densities, transports, and models in a guide's coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

from genkit import vi


pytestmark = pytest.mark.usefixtures("x64")


def model(y):
    scale = numpyro.sample("scale", dist.Gamma(2.0, 1.0))
    x = numpyro.sample("x", dist.Normal(jnp.zeros(2), scale).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


Y = np.array([0.3, -1.2])


def guides():
    made = {
        "mean field": vi.mean_field(model, Y),
        "full rank": vi.full_rank(model, Y),
        "low rank": vi.low_rank(model, Y),
        "flow": vi.flow_guide(model, Y, key=jax.random.key(0), num_layers=2, width=4),
    }
    # away from their start, where the flow is still affine and the factors still diagonal
    shift = lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape) if jnp.ndim(a) else a
    return {name: jax.tree.map(lambda a: shift(a) if isinstance(a, jax.Array) else a, g) for name, g in made.items()}


@pytest.mark.parametrize(
    "name", ["flow", *[pytest.param(n, marks=pytest.mark.slow) for n in ("mean field", "full rank", "low rank")]]
)
@pytest.mark.key_reuse  # one key for several questions
def test_guides_know_their_density_and_their_coordinates(name):
    guide = guides()[name]
    key = jax.random.key(1)

    @jax.jit
    def facts():
        value, log_q = guide.sample(key=key)
        z = jax.random.normal(key, (3,))
        x, log_det = guide.base.transport(z)
        jacobian = jax.jacobian(lambda z: guide.base.transport(z)[0])(z)
        pushed = jnp.sum(dist.Normal(0.0, 1.0).log_prob(z)) - log_det
        values, log_constrain = guide.layout.constrain(x)
        joint = vi.program(model)(Y).log_density(values)
        moved, _ = log_density(vi.neutra(model, guide), (Y,), {}, {"_genkit_coordinates": z})
        return {
            "density of a draw": (log_q, guide.log_density(value)),
            "log-determinant": (log_det, jnp.linalg.slogdet(jacobian)[1]),
            "density of an image": (guide.base.log_density(x), pushed),
            "model in the coordinates": (moved, joint + log_constrain + log_det),
        }

    for what, (got, want) in facts().items():
        np.testing.assert_allclose(got, want, rtol=1e-9, err_msg=what)


def test_only_automatic_guides_make_coordinates():
    with pytest.raises(TypeError):
        vi.neutra(model, lambda: None)  # pyright: ignore[reportArgumentType]
