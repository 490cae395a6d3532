r"""Gradient strategies that need one evaluation of the rest of the program.

A strategy turns a site into a surrogate. With $k(v)$ the surrogate of everything after the site, a strategy returns a
scalar whose expectation is $E_q[k(v)]$ and whose expected derivative is the derivative of that. Local strategies do so
by attaching something to the drawn value, so the program runs once.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Key, PyTree, Shaped

from .._core._checks import check_interval, check_positive, describe
from ._frame import draw_law, is_exact, magic
from ._laws import kind, lanes, unmask


class Attached(NamedTuple):
    """A drawn value and what must travel with it."""

    value: Any
    intermediates: Any = ()
    score: Any = None
    log_weight: Any = None
    baseline: Any = None


class Strategy(eqx.Module):
    r"""How the gradient passes through one sample site.

    `strategy(key, dist, k)` returns a scalar `s` with $E[s] = E_{v \sim q}[k(v)]$ and
    $E[\partial s] = \partial E_{v \sim q}[k(v)]$, where `k` may be called any number of times (also under `jax.vmap`).
    Subclass it to write your own. A method `check(law, address)`, where there is one, is asked before a site is drawn
    and raises for laws the strategy cannot serve. `unbiased` says whether expected gradients are exact.
    """

    unbiased: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(
        self, key: Key[Array, ""], law: dist.Distribution, k: Callable[[Any], Float[Array, ""]]
    ) -> Float[Array, ""]:
        """The surrogate of the site.

        Args:
            key: typed PRNG key of the site.
            law: the numpyro law of the site.
            k: the rest of the program as a function of the site's value.

        Returns:
            A scalar surrogate.
        """


class AbstractLocalStrategy(Strategy):
    """A strategy that needs only one continuation: it draws and attaches."""

    @abc.abstractmethod
    def attach(self, key: Key[Array, ""], law: dist.Distribution) -> Attached:
        """Draw a value of `law` and say what must travel with it.

        Args:
            key: typed PRNG key of the site.
            law: the numpyro law of the site, without masks.

        Returns:
            The value, the law's intermediates, and optionally a score, a log-weight and a baseline.
        """

    def __call__(
        self, key: Key[Array, ""], law: dist.Distribution, k: Callable[[Any], Float[Array, ""]]
    ) -> Float[Array, ""]:
        """Run `k` at the drawn value and multiply what was attached."""
        got = self.attach(key, law)
        out = k(got.value)
        if got.log_weight is not None:
            out = out * jnp.exp(got.log_weight)
        if got.score is not None:
            factor = magic(jnp.sum(got.score))
            out = out * factor
            if got.baseline is not None:
                out = out + jnp.sum(stop_gradient(got.baseline)) * (1 - factor)
        return out


def refuse(strategy: Any, law: dist.Distribution, address: str, why: str, hint: str) -> None:
    """One voice for a strategy that cannot serve a law."""
    raise ValueError(
        f"`grad` at site {address!r} must suit the law {kind(law)}; got {type(strategy).__name__}, which {why}. {hint}"
    )


class Reparam(AbstractLocalStrategy):
    """Pathwise gradient: the draw is a differentiable function of the parameters.

    Needs a law with a reparametrised sampler, and a program that is continuous in the drawn value.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> fn = lambda m: vi.sample("x", dist.Normal(m, 1.0), grad=vi.Reparam())
        >>> float(jax.grad(lambda m: vi.E(fn)(m, key=jax.random.key(0)))(0.5))
        1.0

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, section 2.4.
    """

    def attach(self, key: Key[Array, ""], law: dist.Distribution) -> Attached:
        """Draw with the law's own differentiable sampler."""
        value, intermediates = draw_law(law, key)
        return Attached(value, intermediates)

    def check(self, law: dist.Distribution, address: str) -> None:
        """Refuse laws without a differentiable sampler."""
        if not law.has_rsample:
            refuse(self, law, address, "needs a reparametrised sampler", "Use Enum(), RLOO(2), MVD() or Score().")


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

    def attach(self, key: Key[Array, ""], law: dist.Distribution) -> Attached:
        """Draw and stop the gradient."""
        value, _ = draw_law(law, key)
        return Attached(stop_gradient(value))


class Moving(eqx.Module):
    r"""A moving-average baseline, $b \leftarrow \beta b + (1 - \beta) F$ with $F$ the value of the objective.

    Keep it as a leaf of the model and give it to `Score(model.baseline)`; objectives made by `maximize` and `minimize`
    write the new value back through `aux["updates"]`.

    Args:
        value: the current baseline.
        decay: beta, in [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import vi
        >>> round(float(vi.Moving(0.0, 0.9).update(jnp.array(10.0))()), 4)
        1.0
    """

    value: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.0)
    decay: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=0.9)

    def __check_init__(self) -> None:
        """Validate the decay."""
        check_interval("decay", self.decay, 0, 1, open_hi=True)

    def __call__(self) -> Float[Array, ""]:
        """The current baseline, not differentiated."""
        return stop_gradient(self.value)

    def update(self, value: Float[Array, ""]) -> "Moving":
        """The baseline after seeing one value of the objective.

        Args:
            value: the value of the objective.

        Returns:
            The updated baseline.
        """
        new = self.decay * self.value + (1 - self.decay) * stop_gradient(value)
        return eqx.tree_at(lambda m: m.value, self, new.astype(self.value.dtype))


class Learned(eqx.Module):
    r"""A learned baseline: any module `net(*inputs) -> scalar`, trained on $(F - b)^2$ by the same gradient step.

    Make it a leaf of the model. Its inputs must not depend on the value drawn at the site.

    Args:
        net: a callable pytree.
        inputs: what it is called with.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import vi
        >>> float(vi.Learned(lambda x: 2.0 * x, (jnp.array(3.0),))())
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
        baseline: None, a number or array, a `Moving` average, or a `Learned` module.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.Score(baseline=2.0))
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0

    Source: Williams, Machine Learning 8 (1992); any-order form: Foerster et al., "DiCE", ICML 2018, equation 5.
    """

    baseline: PyTree = None

    def attach(self, key: Key[Array, ""], law: dist.Distribution) -> Attached:
        """Draw, stop the gradient and attach the score."""
        value, _ = draw_law(law, key)
        value = stop_gradient(value)
        return Attached(value, (), law.log_prob(value), None, self.baseline)


class Importance(AbstractLocalStrategy):
    r"""Draw from another law $r$ and multiply by $q(v)/r(v)$, differentiated through $\log q$.

    Args:
        proposal: a numpyro law with the support of the site, or a function of the site's law returning one. Its own
            parameters receive no gradient.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.Importance(dist.Bernoulli(0.5)))
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0
    """

    proposal: Any

    def attach(self, key: Key[Array, ""], law: dist.Distribution) -> Attached:
        """Draw from the proposal and attach the log-weight."""
        is_law = isinstance(self.proposal, dist.Distribution)
        proposal = self.proposal if is_law else self.proposal(law)
        if not isinstance(proposal, dist.Distribution):
            raise TypeError(f"`proposal` must be a numpyro distribution or return one; got {describe(proposal)}.")
        value = stop_gradient(draw_law(proposal, key)[0])
        log_r = stop_gradient(jnp.sum(proposal.log_prob(value)))
        return Attached(value, (), None, jnp.sum(law.log_prob(value)) - log_r)


class Implicit(AbstractLocalStrategy):
    r"""Implicit reparametrisation through the distribution function.

    $\partial v / \partial\theta = -\partial_\theta F(v;\theta) / q(v)$; for a vector mixture with independent
    components, the same with the autoregressive conditional distribution functions. Serves laws without a
    differentiable sampler but with a `cdf`, in particular mixtures. First-order only.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from genkit import vi
        >>> parts = lambda m: dist.Normal(m + jnp.array([0.0, 3.0]), 1.0)
        >>> law = lambda m: dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.4, 0.6])), parts(m))
        >>> fn = lambda m: vi.sample("x", law(m), grad=vi.Implicit())
        >>> round(float(jax.grad(lambda m: vi.E(fn)(m, key=jax.random.key(0)))(0.5)), 4)
        1.0

    Source: Figurnov, Mohamed & Mnih, "Implicit Reparameterization Gradients", NeurIPS 2018, equations 5 and 9.
    """

    def attach(self, key: Key[Array, ""], law: dist.Distribution) -> Attached:
        """Draw and attach the implicit derivative."""
        if law.has_rsample:
            return Attached(*draw_law(law, key))
        value = stop_gradient(draw_law(law, key)[0])
        if law.event_dim == 0:
            cdf = law.cdf(value)
            density = stop_gradient(jnp.exp(law.log_prob(value)))
            return Attached(value - (cdf - stop_gradient(cdf)) / density)
        transform = _conditional_cdfs(law, value)
        dim = value.shape[-1]
        columns = [
            jax.jvp(lambda v: _conditional_cdfs(law, v), (value,), (jnp.zeros_like(value).at[..., i].set(1.0),))[1]
            for i in range(dim)
        ]
        jacobian = stop_gradient(jnp.stack(columns, -1))
        shift = jnp.linalg.solve(jacobian, (transform - stop_gradient(transform))[..., None])[..., 0]
        return Attached(value - shift)

    def check(self, law: dist.Distribution, address: str) -> None:
        """Refuse discrete laws and laws whose distribution function is unknown."""
        ok = law.has_rsample or (not law.is_discrete and _has_cdf(law))
        if not ok:
            refuse(self, law, address, "needs a differentiable distribution function", "Use Score() or RLOO(2).")


def _has_cdf(law: dist.Distribution) -> bool:
    """Whether `cdf` (or, for vectors, the conditional ones of a mixture) can be computed."""
    if law.event_dim == 0:
        if isinstance(law, dist.ExpandedDistribution):
            return _has_cdf(law.base_dist)
        own = type(law).cdf is not dist.Distribution.cdf
        return own and (not hasattr(law, "component_distribution") or _has_cdf(law.component_distribution))
    if not isinstance(law, dist.MixtureSameFamily) or law.event_dim != 1:
        return False
    part = law.component_distribution
    return isinstance(part, dist.Independent) and _has_cdf(part.base_dist)


def _conditional_cdfs(law: Any, value: Any) -> Any:
    """F(v_d | v_<d) of a mixture of independent components, shape of `value`."""
    base = law.component_distribution.base_dist  # batch (..., K, d)
    point = value[..., None, :]
    log_part = base.log_prob(point)
    before = jnp.cumsum(log_part, -1) - log_part
    logits = jnp.log(law.mixing_distribution.probs)[..., None] + before
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
        """Validate the temperature."""
        check_positive("temperature", self.temperature)

    def attach(self, key: Key[Array, ""], law: dist.Distribution) -> Attached:
        """Draw the relaxed value."""
        if is_exact():
            raise ValueError("`exact` must meet discrete draws only; got a site under Relaxed, which is continuous.")
        logits = bernoulli_logits(law)
        noise = jr.logistic(key, logits.shape, logits.dtype)
        return Attached(jax.nn.sigmoid((logits + noise) / self.temperature))

    def check(self, law: dist.Distribution, address: str) -> None:
        """Refuse everything but Bernoulli laws."""
        if not is_bernoulli(law):
            refuse(self, law, address, "relaxes Bernoulli laws only", "Use Enum(), RLOO(2) or MVD().")


def is_bernoulli(law: dist.Distribution) -> bool:
    """Whether every lane is a Bernoulli law."""
    return isinstance(lanes(law), (dist.BernoulliProbs, dist.BernoulliLogits))


def bernoulli_logits(law: dist.Distribution) -> Any:
    """The logits of a Bernoulli law, of its lane shape."""
    base = lanes(unmask(law))
    shape = tuple(law.batch_shape) + tuple(law.event_shape)
    return jnp.broadcast_to(base.logits, shape)
