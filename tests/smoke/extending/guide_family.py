"""A guide family of one's own: independent logistic distributions on the unconstrained space."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import genkit as gk


class Logistic(gk.vi.AbstractBase):
    """Heavier tails than a normal, in closed form."""

    loc: jax.Array
    log_scale: jax.Array

    def _law(self):
        return dist.Logistic(self.loc, jnp.exp(self.log_scale)).to_event(1)

    def sample(self, key):
        x = self._law().rsample(key)
        return x, self._law().log_prob(x)

    def log_density(self, x):
        return self._law().log_prob(x)

    def transport(self, z):
        u = self.loc + jnp.exp(self.log_scale) * jax.scipy.special.logit(jax.scipy.stats.norm.cdf(z))
        return u, jnp.sum(jax.scipy.stats.norm.logpdf(z)) - self.log_density(u)


def model():
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal()), 1.0), obs=1.0)


layout = gk.vi.Layout((dist.transforms.IdentityTransform(),), ("x",), ((),))
guide = gk.vi.Guide(Logistic(jnp.zeros(1), jnp.zeros(1)), layout)
posterior = gk.infer(gk.Problem(model), gk.vi.Fit(guide, num_steps=500, num_samples=1000), key=jax.random.key(0))
assert abs(posterior.samples["x"].mean() - 0.5) < 0.15
