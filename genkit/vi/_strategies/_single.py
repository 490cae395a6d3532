r"""Gradient strategies that need one evaluation of the rest of the program.

A strategy turns a site into a surrogate. With $k(v)$ the surrogate of everything after the site, a strategy returns a
scalar whose expectation is $E_q[k(v)]$ and whose expected derivative is the derivative of that. Local strategies do so
by attaching something to the drawn value, so the program runs once.
"""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Key, PyTree, Shaped

from genkit._core._checks import check_interval, check_positive, describe
from genkit.vi._runtime._distributions import kind, lane_shape, lanes, unmask
from genkit.vi._runtime._enumeration import draw_from, is_exact
from genkit.vi._runtime._strategy import AbstractLocalStrategy, Attached, Strategy


def refuse(strategy: Strategy, distribution: dist.Distribution, address: str, why: str, hint: str) -> None:
    """One voice for a strategy that cannot serve a distribution."""
    raise ValueError(
        f"`grad` at site {address!r} must suit the distribution {kind(distribution)}; got {type(strategy).__name__}, "
        f"which {why}. {hint}"
    )


class Reparam(AbstractLocalStrategy):
    """Pathwise gradient: the draw is a differentiable function of the parameters.

    Needs a distribution with a reparametrized sampler, and a program that is continuous in the drawn value.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> fn = lambda m: vi.sample("x", dist.Normal(m, 1.0), grad=vi.Reparam())
        >>> float(jax.grad(lambda m: vi.E(fn)(m, key=jax.random.key(0)))(0.5))
        1.0

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, section 2.4.
    """

    def attach(self, key: Key[Array, ""], distribution: dist.Distribution) -> Attached:
        value, intermediates = draw_from(distribution, key)
        return Attached(value, intermediates)

    def check(self, distribution: dist.Distribution, address: str) -> None:
        if not distribution.has_rsample:
            refuse(
                self, distribution, address, "needs a reparametrized sampler", "Use Enum(), RLOO(2), MVD() or Score()."
            )


class Detach(AbstractLocalStrategy):
    """Draw without any gradient through this site: what wake phases do. Deliberately drops a term.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> fn = lambda m: vi.sample("x", dist.Normal(m, 1.0), grad=vi.Detach())
        >>> float(jax.grad(lambda m: vi.E(fn)(m, key=jax.random.key(0)))(0.5))
        0.0
    """

    unbiased: ClassVar[bool] = False

    def attach(self, key: Key[Array, ""], distribution: dist.Distribution) -> Attached:
        value, _ = draw_from(distribution, key)
        return Attached(stop_gradient(value))


class MovingBaseline(eqx.Module):
    r"""A moving-average baseline, $b \leftarrow \beta b + (1 - \beta) F$ with $F$ the value of the objective.

    Keep it as a leaf of the model and give it to `Score(model.baseline)`; objectives made by `maximize` and `minimize`
    write the new value back through `aux["updates"]`.

    Args:
        value: the current baseline.
        decay: beta, in [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import vi
        >>> round(float(vi.MovingBaseline(0.0, 0.9).update(jnp.array(10.0))()), 4)
        1.0
    """

    value: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.0)
    decay: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.9)

    def __check_init__(self) -> None:
        check_interval("decay", self.decay, 0, 1, open_hi=True)

    def __call__(self) -> Float[Array, ""]:
        """The current baseline, not differentiated."""
        return stop_gradient(self.value)

    def update(self, value: Float[Array, ""]) -> "MovingBaseline":
        """The baseline after seeing one value of the objective.

        Args:
            value: the value of the objective.

        Returns:
            The updated baseline.
        """
        new = self.decay * self.value + (1 - self.decay) * stop_gradient(value)
        return eqx.tree_at(lambda m: m.value, self, new.astype(self.value.dtype))


class LearnedBaseline(eqx.Module):
    r"""A learned baseline: any module `net(*inputs) -> scalar`, trained on $(F - b)^2$ by the same gradient step.

    Make it a leaf of the model. Its inputs must not depend on the value drawn at the site.

    Args:
        net: a callable pytree.
        inputs: what it is called with.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import vi
        >>> float(vi.LearnedBaseline(lambda x: 2.0 * x, (jnp.array(3.0),))())
        6.0
    """

    net: Callable
    inputs: tuple = ()

    def __call__(self) -> Float[Array, ""]:
        """The predicted value of the objective."""
        return self.net(*jax.tree.map(stop_gradient, self.inputs))


class Score(AbstractLocalStrategy):
    r"""The score-function (REINFORCE) gradient, $k(v)\,\nabla \log q(v)$, with an optional baseline.

    With a baseline $b$ that does not depend on the draw, $(k(v) - b) \nabla \log q(v)$ has the same mean.

    Args:
        baseline: None, a number or array, a `MovingBaseline` average, or a `LearnedBaseline` module.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.Score(baseline=2.0))
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0

    Source: Williams, Machine Learning 8 (1992); any-order form: Foerster et al., "DiCE", ICML 2018, equation 5.
    """

    baseline: PyTree = None

    def attach(self, key: Key[Array, ""], distribution: dist.Distribution) -> Attached:
        value, _ = draw_from(distribution, key)
        value = stop_gradient(value)
        return Attached(value, (), distribution.log_prob(value), None, self.baseline)


class Importance(AbstractLocalStrategy):
    r"""Draw from another distribution $r$ and multiply by $q(v)/r(v)$, differentiated through $\log q$.

    Args:
        proposal: a numpyro distribution with the support of the site, or a function of the site's distribution
            returning one. Its own parameters receive no gradient.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.Importance(dist.Bernoulli(0.5)))
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0
    """

    proposal: dist.Distribution | Callable[[dist.Distribution], dist.Distribution]

    def attach(self, key: Key[Array, ""], distribution: dist.Distribution) -> Attached:
        proposal = self._proposal_for(distribution)
        value = stop_gradient(draw_from(proposal, key)[0])
        log_r = stop_gradient(jnp.sum(proposal.log_prob(value)))
        return Attached(value, (), None, jnp.sum(distribution.log_prob(value)) - log_r)

    def _proposal_for(self, distribution: dist.Distribution) -> dist.Distribution:
        """The proposal for one site."""
        given = self.proposal
        if isinstance(given, dist.Distribution):
            return given
        made = given(distribution)
        if not isinstance(made, dist.Distribution):
            raise TypeError(f"`proposal` must be a numpyro distribution or return one; got {describe(made)}.")
        return made


class Implicit(AbstractLocalStrategy):
    r"""Implicit reparametrization through the distribution function.

    $\partial v / \partial\theta = -\partial_\theta F(v;\theta) / q(v)$; for a vector mixture with independent
    components, the same with the autoregressive conditional distribution functions. Serves distributions without a
    differentiable sampler but with a `cdf`, in particular mixtures. First-order only.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from genkit import vi
        >>> parts = lambda m: dist.Normal(m + jnp.array([0.0, 3.0]), 1.0)
        >>> distribution = lambda m: dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.4, 0.6])), parts(m))
        >>> fn = lambda m: vi.sample("x", distribution(m), grad=vi.Implicit())
        >>> round(float(jax.grad(lambda m: vi.E(fn)(m, key=jax.random.key(0)))(0.5)), 4)
        1.0

    Source: Figurnov, Mohamed & Mnih, "Implicit Reparameterization Gradients", NeurIPS 2018, equations 5 and 9.
    """

    def attach(self, key: Key[Array, ""], distribution: dist.Distribution) -> Attached:
        if distribution.has_rsample:
            return Attached(*draw_from(distribution, key))
        value = stop_gradient(draw_from(distribution, key)[0])
        if distribution.event_dim == 0:
            cdf = distribution.cdf(value)
            density = stop_gradient(jnp.exp(distribution.log_prob(value)))
            return Attached(value - (cdf - stop_gradient(cdf)) / density)
        transform = _conditional_cdfs(distribution, value)
        columns = []
        for i in range(value.shape[-1]):
            direction = jnp.zeros_like(value).at[..., i].set(1.0)
            columns.append(jax.jvp(lambda v: _conditional_cdfs(distribution, v), (value,), (direction,))[1])
        jacobian = stop_gradient(jnp.stack(columns, -1))
        shift = jnp.linalg.solve(jacobian, (transform - stop_gradient(transform))[..., None])[..., 0]
        return Attached(value - shift)

    def check(self, distribution: dist.Distribution, address: str) -> None:
        ok = distribution.has_rsample or (not distribution.is_discrete and _has_cdf(distribution))
        if not ok:
            refuse(
                self, distribution, address, "needs a differentiable distribution function", "Use Score() or RLOO(2)."
            )


def _has_cdf(distribution: dist.Distribution) -> bool:
    """True if `cdf` (or, for vectors, the conditional ones of a mixture) can be computed."""
    if distribution.event_dim == 0:
        if isinstance(distribution, dist.ExpandedDistribution):
            return _has_cdf(distribution.base_dist)
        if type(distribution).cdf is dist.Distribution.cdf:  # numpyro's stub, which raises
            return False
        if isinstance(distribution, dist.MixtureSameFamily):
            return _has_cdf(distribution.component_distribution)
        if isinstance(distribution, dist.MixtureGeneral):
            return all(_has_cdf(part) for part in distribution.component_distributions)
        return True
    if not isinstance(distribution, dist.MixtureSameFamily) or distribution.event_dim != 1:
        return False
    part = distribution.component_distribution
    return isinstance(part, dist.Independent) and _has_cdf(part.base_dist)


def _conditional_cdfs(distribution: dist.MixtureSameFamily, value: Array) -> Array:
    """F(v_d | v_<d) of a mixture of independent components, shape of `value`."""
    base = distribution.component_distribution.base_dist  # batch (..., K, d)
    point = value[..., None, :]
    log_part = base.log_prob(point)
    before = jnp.cumsum(log_part, -1) - log_part  # of the coordinates in front of each
    logits = jnp.log(distribution.mixing_distribution.probs)[..., None] + before
    return jnp.sum(jax.nn.softmax(logits, -2) * base.cdf(point), -2)


class Relaxed(AbstractLocalStrategy):
    """The binary Concrete relaxation of a Bernoulli site: BIASED, never a default.

    The site takes a value in (0, 1) instead of {0, 1}, so the objective itself changes; small temperatures approach it
    with growing variance.

    Args:
        temperature: positive.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> fn = lambda p: vi.sample("b", dist.Bernoulli(p), grad=vi.Relaxed(0.5))
        >>> 0 < float(vi.E(fn)(0.3, key=jax.random.key(0))) < 1
        True

    Source: Maddison, Mnih & Teh, "The Concrete Distribution", ICLR 2017, appendix B.
    """

    unbiased: ClassVar[bool] = False
    temperature: Shaped[Array, ""] = eqx.field(converter=jnp.asarray)

    def __check_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def attach(self, key: Key[Array, ""], distribution: dist.Distribution) -> Attached:
        if is_exact():
            raise ValueError("`exact` must meet discrete draws only; got a site under Relaxed, which is continuous.")
        logits = bernoulli_logits(distribution)
        noise = jr.logistic(key, logits.shape, logits.dtype)
        return Attached(jax.nn.sigmoid((logits + noise) / self.temperature))

    def check(self, distribution: dist.Distribution, address: str) -> None:
        if not is_bernoulli(distribution):
            refuse(self, distribution, address, "relaxes Bernoulli distributions only", "Use Enum(), RLOO(2) or MVD().")


def is_bernoulli(distribution: dist.Distribution) -> bool:
    """True if every lane has a Bernoulli distribution."""
    return isinstance(lanes(distribution), (dist.BernoulliProbs, dist.BernoulliLogits))


def bernoulli_logits(distribution: dist.Distribution) -> Array:
    """The logits of a Bernoulli distribution, of its lane shape."""
    return jnp.broadcast_to(lanes(unmask(distribution)).logits, lane_shape(distribution))
