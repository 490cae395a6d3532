"""Forward divergences, f-divergences, and the phases of reweighted wake-sleep."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from genkit._core._checks import check_count, describe
from genkit.vi._objectives._matching import draw_and_weigh
from genkit.vi._programs._copies import looped_apart
from genkit.vi._programs._program import Program, evaluate, simulate, weigh
from genkit.vi._runtime._frame import require_frame
from genkit.vi._strategies._single import Detach


def forward_kl(p: Any, q: Any) -> Float[Array, ""]:
    r"""$E_p[\log p - \log q]$, drawing from `p`; minimize.

    Args:
        p: a measure that can be drawn from (a posterior that is known, a simulator, `normalize(...)`).
        q: the guide; only its density is used.

    Returns:
        A scalar estimate.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> coin = vi.program(lambda prob: vi.sample("b", dist.Bernoulli(prob)))
        >>> fn = lambda: vi.forward_kl(coin(0.3), coin(0.5))
        >>> round(float(vi.E(fn)(key=jax.random.key(0))), 4)
        0.0823
    """
    require_frame("forward_kl")
    value, log_p, _ = simulate(p)
    return log_p - weigh(q, value)


def f_divergence(p: Any, q: Any, divergence: Any) -> Float[Array, ""]:
    r"""$E_q f(p/q)$ for a `gk.divergence` object; minimize. For a normalized `p` it is the divergence itself.

    Args:
        p: the model; unnormalized models give the divergence to `p` as it is.
        q: the guide.
        divergence: an `FDivergence`.

    Returns:
        A scalar estimate.

    Raises:
        TypeError: if `divergence` has no `phi`.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import divergence, vi
        >>> coin = vi.program(lambda prob: vi.sample("b", dist.Bernoulli(prob)))
        >>> fn = lambda: vi.f_divergence(coin(0.3), coin(0.5), divergence.ForwardKL())
        >>> round(float(vi.E(fn)(key=jax.random.key(0))), 4)
        0.0823
    """
    require_frame("f_divergence")
    if not hasattr(divergence, "phi"):
        raise TypeError(f"`divergence` must be a gk.divergence object; got {describe(divergence)}.")
    _, log_p, log_q, _, _ = draw_and_weigh(p, q)
    return divergence.phi(log_p - log_q)


def _detached(p: Any, q: Any, size: int) -> tuple[Any, Any, Any]:
    """K detached draws: normalized weights, log p and log q."""
    check_count("num_particles", size)
    frame = require_frame("wake")

    def lane(index: Any) -> tuple[Any, Any]:
        del index
        _, log_p, log_q, _, _ = draw_and_weigh(p, q)
        return log_p, log_q

    with frame.forcing(Detach()):
        (log_p, log_q), _ = looped_apart("particles", lane, size)
    return stop_gradient(jax.nn.softmax(log_p - log_q)), log_p, log_q


def wake_q(p: Any, q: Any, num_particles: int) -> Float[Array, ""]:
    r"""The q-wake objective $\sum_k \bar w_k \log q(z_k)$, weights and draws detached; maximize.

    Consistent for the forward KL as K grows, not unbiased.

    Args:
        p: the unnormalized model.
        q: the guide.
        num_particles: K.

    Returns:
        A scalar whose gradient reaches `q` only.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> coin = vi.program(lambda prob: vi.sample("b", dist.Bernoulli(prob)))
        >>> fn = lambda: vi.wake_q(coin(0.3), coin(0.5), 2)
        >>> round(float(vi.E(fn)(key=jax.random.key(0))), 4)
        -0.6931

    Source: Bornschein & Bengio, "Reweighted Wake-Sleep", ICLR 2015, equation 8.
    """
    weights, _, log_q = _detached(p, q, num_particles)
    return jnp.sum(weights * log_q)


def wake_p(p: Any, q: Any, num_particles: int) -> Float[Array, ""]:
    r"""The p-wake objective $\sum_k \bar w_k \log p(x, z_k)$, weights and draws detached; maximize.

    Args:
        p: the unnormalized model.
        q: the guide.
        num_particles: K.

    Returns:
        A scalar whose gradient reaches `p` only.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> coin = vi.program(lambda prob: vi.sample("b", dist.Bernoulli(prob)))
        >>> fn = lambda: vi.wake_p(coin(0.5), coin(0.3), 2)
        >>> round(float(vi.E(fn)(key=jax.random.key(0))), 4)
        -0.6931

    Source: Bornschein & Bengio, "Reweighted Wake-Sleep", ICLR 2015, equation 6.
    """
    weights, log_p, _ = _detached(p, q, num_particles)
    return jnp.sum(weights * log_p)


def sleep(p: Any, q: Any) -> Float[Array, ""]:
    r"""The sleep objective $E_{p(x, z)} \log q(z \mid x)$; maximize. Unbiased.

    Args:
        p: the model without observations, so that latents and data are drawn.
        q: a guide, or a function from the drawn dict to a guide; it weighs the sites it has.

    Returns:
        A scalar whose gradient reaches `q` only.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> coin = vi.program(lambda prob: vi.sample("b", dist.Bernoulli(prob)))
        >>> fn = lambda: vi.sleep(coin(0.3), coin(0.5))
        >>> round(float(vi.E(fn)(key=jax.random.key(0))), 4)
        -0.6931

    Source: Hinton, Dayan, Frey & Neal, "The wake-sleep algorithm", Science 268 (1995).
    """
    frame = require_frame("sleep")
    with frame.forcing(Detach()):
        value, _, _ = simulate(p)
    guide = q if hasattr(q, "log_density") else q(value)
    if isinstance(guide, Program):
        return evaluate(guide, value, strict=False).log_density
    return weigh(guide, value)
