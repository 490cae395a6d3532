"""Measures made of measures: their densities are estimates, and their draws belong to the surrounding `E`."""

import fnmatch
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key, PyTree
from numpyro.distributions.transforms import Transform

from genkit._core._checks import check, describe
from genkit.inference import Measure, as_measure
from genkit.vi._measures._population import SIR, SMC, frame_for, population, propose
from genkit.vi._objectives._bounds import log_mean_exp
from genkit.vi._programs._copies import particles
from genkit.vi._programs._program import Program, simulate, weigh
from genkit.vi._programs._sites import draw_site
from genkit.vi._runtime._frame import current_frame


class Marginal(Measure):
    """A program with some sites summed out by importance sampling; made by `marginal`.

    Args:
        measure: the joint program.
        keep: globs of the kept sites.
        algorithm: how the others are proposed.
    """

    measure: Measure
    keep: tuple[str, ...] = eqx.field(static=True)
    algorithm: SIR

    def _split(self, value: dict[str, PyTree]) -> tuple[dict, dict]:
        """The kept sites and the others."""
        kept = {k: v for k, v in value.items() if any(fnmatch.fnmatchcase(k, glob) for glob in self.keep)}
        check(bool(kept), "keep", f"matched by some site of the program ({', '.join(sorted(value))})", str(self.keep))
        return kept, {k: v for k, v in value.items() if k not in kept}

    def _ratios(self, kept: dict[str, PyTree], size: int) -> Array | None:
        """Log P(z, u) - log r(u | z) at `size` proposed u."""

        def lane() -> Array:
            dropped, log_r = simulate(propose(self.algorithm.proposal, kept))[:2]
            return weigh(self.measure, {**kept, **dropped}) - log_r

        return particles(lane, size)

    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        """Draw the kept sites; the estimate reuses the program's own draw of the others as first particle.

        Args:
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The dict of kept values and the log of the estimated density.
        """
        with frame_for(key):
            value, log_joint, _ = simulate(self.measure)
            kept, dropped = self._split(value)
            ratios = (log_joint - weigh(propose(self.algorithm.proposal, kept), dropped))[None]
            others = self._ratios(kept, self.algorithm.num_particles - 1)
            if others is not None:
                ratios = jnp.concatenate([ratios, others])
            return kept, log_mean_exp(ratios)

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The log of an unbiased estimate of the marginal density.

        Args:
            value: dict of the kept sites.
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The log of the estimate.
        """
        with frame_for(key):
            return log_mean_exp(self._ratios(value, self.algorithm.num_particles))


class Normalized(Measure):
    """An unnormalized measure turned into one that can be drawn from; made by `normalize`.

    Args:
        measure: the unnormalized measure.
        algorithm: `SIR` or `SMC`.
    """

    measure: Measure
    algorithm: SIR | SMC

    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        r"""Draw particles and keep one; the estimate is $\tilde p(z) / \hat Z$.

        Args:
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The kept particle and the log of the estimated density.
        """
        with frame_for(key) as frame:
            drawn = population(self.measure, self.algorithm, None)
            distribution = dist.Categorical(logits=drawn.log_w)
            index, _ = draw_site(frame, frame.fresh("index"), distribution, self.algorithm.grad)
            index = index.astype(int)
            kept = jax.tree.map(lambda x: x[index], drawn.values)
            return kept, drawn.log_p[index] - drawn.log_z

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The log of an unbiased estimate of the density of what `sample` draws, with `value` among the particles.

        Args:
            value: a value of the measure.
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The log of the estimate.
        """
        if isinstance(self.algorithm, SIR):
            proposals = (self.algorithm.proposal,)
        else:
            proposals = self.algorithm.proposals
        for proposal in proposals:
            if isinstance(proposal, Marginal | Normalized):
                raise ValueError(  # noqa: TRY004 - the type is fine, its density is not
                    "`proposal` must have an exact density to weigh a given value; got an estimated one "
                    f"({type(proposal).__name__})."
                )
        with frame_for(key):
            drawn = population(self.measure, self.algorithm, value)
            return drawn.log_p[0] - drawn.log_z


class Flow(Measure):
    """The image of a measure under a bijection; made by `flow`.

    Args:
        base: a measure over arrays.
        bijector: a numpyro transform.
    """

    base: Measure
    bijector: Transform

    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        """Draw from the base and push forward.

        Args:
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The image and its log-density.
        """
        with frame_for(key):
            x, log_base, _ = simulate(self.base)
        y = self.bijector(x)
        return y, log_base - jnp.sum(self.bijector.log_abs_det_jacobian(x, y))

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The log-density through the inverse.

        Args:
            value: a point of the image.
            key: needed only by a base that estimates its density.

        Returns:
            The log-density.
        """
        x = self.bijector.inv(value)
        if current_frame() is None:
            log_base = self.base.log_density(x, key=key)
        else:
            log_base = weigh(self.base, x)
        return log_base - jnp.sum(self.bijector.log_abs_det_jacobian(x, value))


def marginal(measure: Program, keep: str | Sequence[str], algorithm: SIR) -> Marginal:
    r"""Sum sites out of a program by importance sampling, unbiasedly.

    With helper $r(u \mid z)$ and M particles the density estimate is $\frac1M\sum_j P(z, u_j)/r(u_j \mid z)$. As a
    guide inside `elbo` this is hierarchical VI (M = 1) and its importance-weighted form; inside `iwelbo` the doubly
    importance-weighted one.

    Args:
        measure: the joint program.
        keep: names or globs of the sites to keep.
        algorithm: `SIR(M, r)`, `r` a measure over the dropped sites or a function of the kept values returning one.

    Returns:
        A measure over the kept sites.

    Raises:
        TypeError: if `algorithm` is not `SIR` or `measure` is not a program.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> joint = vi.program(lambda: vi.sample("x", dist.Normal(vi.sample("u", dist.Normal(0.0, 1.0)), 1.0)))
        >>> helper = vi.program(lambda x: vi.sample("u", dist.Normal(x / 2, 0.5**0.5)))  # exact, given x
        >>> measure = vi.marginal(joint(), "x", vi.SIR(1, lambda kept: helper(kept["x"])))
        >>> round(float(measure.log_density({"x": 0.5}, key=jax.random.key(0))), 4)  # Normal(0, sqrt 2)
        -1.328

    Source: Sobolev & Vetrov, "Importance Weighted Hierarchical Variational Inference", NeurIPS 2019, equation 4.
    """
    if not isinstance(measure, Program):
        raise TypeError(f"`measure` must be a program; got {describe(measure)}.")
    if not isinstance(algorithm, SIR):
        raise TypeError(f"`algorithm` must be gk.vi.SIR; got {describe(algorithm)}.")
    return Marginal(measure, (keep,) if isinstance(keep, str) else tuple(keep), algorithm)


def normalize(measure: Measure, algorithm: SIR | SMC) -> Normalized:
    r"""Make an unnormalized measure one that can be drawn from.

    Args:
        measure: the unnormalized measure, e.g. a program with observations.
        algorithm: `SIR(N, q)` or `SMC(...)`.

    Returns:
        A measure whose draws are the algorithm's, with an unbiased density estimate of their distribution.

    Raises:
        TypeError: if `algorithm` is neither.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> proposal = vi.program(lambda: vi.sample("x", dist.Normal(0.8, 0.2**0.5)))()
        >>> posterior = vi.normalize(vi.program(model)(1.0), vi.SIR(4, proposal))
        >>> round(float(posterior.log_density({"x": 0.8}, key=jax.random.key(0))), 4)
        -0.1142

    Source: Lew et al., "Probabilistic Programming with Stochastic Probabilities", PLDI 2023, section 4; Cusumano-Towner
    & Mansinghka, "AIDE", NeurIPS 2017.
    """
    if not isinstance(algorithm, SIR | SMC):
        raise TypeError(f"`algorithm` must be gk.vi.SIR or gk.vi.SMC; got {describe(algorithm)}.")
    return Normalized(as_measure(measure), algorithm)


def flow(base: Measure | dist.Distribution, bijector: Transform) -> Flow:
    r"""The image of a measure under a bijection, $\log q(T(x)) = \log q_0(x) - \log|\det T'(x)|$.

    Args:
        base: a measure or numpyro distribution over arrays.
        bijector: a numpyro transform with `inv` and `log_abs_det_jacobian`.

    Returns:
        The image measure.

    Raises:
        TypeError: if `bijector` lacks what is needed.

    Example:
        >>> import numpyro.distributions as dist
        >>> from genkit import vi
        >>> log_normal = vi.flow(dist.Normal(0.0, 1.0), dist.transforms.ExpTransform())
        >>> round(float(log_normal.log_density(1.0)), 4)
        -0.9189
    """
    if not isinstance(bijector, Transform):
        raise TypeError(f"`bijector` must be a numpyro transform; got {describe(bijector)}.")
    return Flow(as_measure(base), bijector)
