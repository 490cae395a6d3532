"""Objectives that bound the negative log-likelihood."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from genkit._core._checks import check_interval
from genkit._core._fields import as_number
from genkit._core._stratified import draw_evenly
from genkit.diffusion._flow import check_ends
from genkit.diffusion._objectives._batch import drop_conditions, regress, split_batch
from genkit.diffusion._schedules._grids import check_grid
from genkit.training import Objective


class LikelihoodBound(Objective):
    r"""Denoising score matching weighted to bound the negative log-likelihood, in nats per example.

    $$-E\log p(x_0) \le \int_{\sigma_{min}}^{\sigma_{max}} \frac{E|D(x_0 + \sigma\varepsilon) - x_0|^2}{\sigma^3}\, d\sigma
      + \frac{E|x_0|^2}{2\sigma_{max}^2} + \frac d2 (1 + \log 2\pi\sigma_{min}^2) .$$

    This is $\tfrac12 \int g^2 E|s - \nabla\log p(x_t \mid x_0)|^2 dt$ for every schedule that runs over these levels. Drawing
    times with density proportional to $g^2/\sigma_t^2$ is, for all of them, drawing $\log\sigma$ uniformly, and leaves
    the weight $1/\sigma^2$: least variance. The last terms do not depend on the model: the prior's share of the bound,
    and the density of $x_0$ given data with the smallest noise, for a decoder $N(x_{\sigma_{min}}, \sigma_{min}^2)$.

    Args:
        sigma_min: smallest noise level, positive.
        sigma_max: largest noise level.
        cond_dropout: probability of replacing the condition of an example by "no condition", in [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> data = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> batch = jax.random.normal(jax.random.key(0), (64, 2))
        >>> value, aux = gk.diffusion.LikelihoodBound(0.01, 50.0)(data, batch, key=jax.random.key(1))
        >>> sorted(aux)
        ['decoder', 'diffusion', 'mse', 'prior']

    Source: Song et al., "Maximum Likelihood Training of Score-Based Diffusion Models", NeurIPS 2021, theorem 3 and
    section 5; Kingma et al., "Variational Diffusion Models", NeurIPS 2021, equation 15.
    """  # noqa: E501

    sigma_min: Float[Array, ""] = eqx.field(converter=as_number)
    sigma_max: Float[Array, ""] = eqx.field(converter=as_number)
    cond_dropout: Float[Array, ""] = eqx.field(converter=as_number, default=0.0)

    def __check_init__(self):
        check_ends(self.sigma_min, self.sigma_max)
        check_interval("cond_dropout", self.cond_dropout, 0, 1)

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the bound on a batch.

        Args:
            model: denoiser `(x, sigma, cond) -> x0` of one example.
            batch: clean examples `(b, *shape)`, or a pair of them and their conditions.
            key: typed PRNG key.

        Returns:
            The bound in nats per example, and its parts: `diffusion` (the part that depends on the model), `prior`,
            `decoder`, and `mse`.
        """
        key_level, key_noise, key_cond = jr.split(key, 3)
        x0, cond = split_batch(batch)
        # Uniform in the logarithm: times in proportion to g^2 / sigma^2 of every schedule, the least variance.
        low = jnp.log(self.sigma_min)
        high = jnp.log(self.sigma_max)
        sigma = jnp.exp(draw_evenly(dist.Uniform(low, high), x0.shape[0], key=key_level)).astype(x0.dtype)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        cond = drop_conditions(cond, self.cond_dropout, key=key_cond)
        diffusion, aux = regress(model, x0, noise, sigma, cond, (high - low) / sigma**2)
        prior, decoder = _fixed_terms(x0, self.sigma_min, self.sigma_max)
        return diffusion + prior + decoder, aux | {"diffusion": diffusion, "prior": prior, "decoder": decoder}


class VariationalBound(Objective):
    r"""The variational bound of the ancestral chain on a grid, in nats per example.

    $$-E\log p(x_0) \le \sum_i \tfrac12 (\sigma_{i+1}^{-2} - \sigma_i^{-2})\, E|D(x_i, \sigma_i) - x_0|^2
      + \frac{E|x_0|^2}{2\sigma_0^2} + \frac d2 (1 + \log 2\pi\sigma_n^2) ,$$

    for the descending levels $\sigma_0 > \dots > \sigma_n > 0$ of the grid. One step of the grid is drawn for each
    example. The finer the grid, the tighter: the limit is `LikelihoodBound`.

    Args:
        grid: descending noise levels, the last positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> bound = gk.diffusion.VariationalBound(gk.diffusion.log_uniform(100, 0.01, 50.0, final=None))
        >>> data = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> batch = jax.random.normal(jax.random.key(0), (64, 2))
        >>> bound(data, batch, key=jax.random.key(1))[0].shape
        ()

    Source: Kingma et al., "Variational Diffusion Models", NeurIPS 2021, equations 11 and 13.
    """

    grid: Float[Array, " levels"]

    def __init__(self, grid: Float[ArrayLike, " levels"]):
        levels = check_grid(grid)
        if levels[-1] == 0:
            raise ValueError("`grid` must be a grid that ends above zero; got a last level of 0. Pass `final=None`.")
        self.grid = jnp.asarray(levels, jnp.result_type(float))

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the bound on a batch.

        Args:
            model: denoiser `(x, sigma, cond) -> x0` of one example.
            batch: clean examples `(b, *shape)`, or a pair of them and their conditions.
            key: typed PRNG key.

        Returns:
            The bound in nats per example, and its parts as for `LikelihoodBound`.
        """
        key_step, key_noise = jr.split(key)
        x0, cond = split_batch(batch)
        steps = len(self.grid) - 1
        place = draw_evenly(dist.Uniform(0.0, 1.0), x0.shape[0], key=key_step)
        # Rounding may take the last quantile to the end of the grid.
        i = jnp.clip((place * steps).astype(int), 0, steps - 1)
        s = self.grid[i].astype(x0.dtype)
        t = self.grid[i + 1].astype(x0.dtype)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        # The difference of the ratios as a product, which does not cancel on fine grids.
        weight = 0.5 * steps * (s - t) * (s + t) / (s * t) ** 2
        diffusion, aux = regress(model, x0, noise, s, cond, weight)
        prior, decoder = _fixed_terms(x0, self.grid[-1], self.grid[0])
        return diffusion + prior + decoder, aux | {"diffusion": diffusion, "prior": prior, "decoder": decoder}


def _fixed_terms(
    x0: Float[Array, " b *shape"], sigma_min: Float[Array, ""], sigma_max: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Terms of a bound that do not depend on the model: the prior's divergence, and minus the decoder's log-density."""
    size = x0[0].size
    prior = 0.5 * jnp.mean(jnp.sum(x0**2, tuple(range(1, x0.ndim)))) / sigma_max**2
    decoder = 0.5 * size * (1 + jnp.log(2 * jnp.pi * jnp.square(sigma_min)))
    return prior, decoder
