"""Objectives on measures. Each is an ordinary function to be called inside `E`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Shaped
from numpyro.distributions import Distribution, ExpandedDistribution, MaskedDistribution
from numpyro.distributions.kl import kl_divergence

from genkit._core._checks import check, check_choice, check_count, check_interval, is_concrete
from genkit.inference import as_measure, mask_of
from genkit.vi._objectives._costs import elbo_terms, with_rest
from genkit.vi._objectives._matching import draw_and_weigh, frozen_log_density
from genkit.vi._programs._copies import looped_apart, one_by_one, probe
from genkit.vi._programs._loops import along_plate
from genkit.vi._programs._program import simulate
from genkit.vi._runtime._distributions import unmask
from genkit.vi._runtime._frame import Score as ScoreTerm, Term, require_frame
from genkit.vi._runtime._record import Record, Site, scaled
from genkit.vi._runtime._strategy import dice_factor
from genkit.vi._strategies._alternatives import RLOO
from genkit.vi._strategies._policy import LEAVE_ONE_OUT
from genkit.vi._strategies._single import AbstractLocalStrategy, Reparam, Score


def elbo(
    p: Any, q: Any, *, stick_the_landing: bool = False, analytic_kl: bool = False, rao_blackwell: bool = True
) -> Float[Array, ""]:
    r"""The evidence lower bound $E_q[\log p - \log q]$; maximize.

    Where the function under `E` is linear in this scalar, the scores of its sites multiply only the costs that depend
    on them: directly or through other draws, as the flow of data through both programs says (program order
    where Python branches on a draw), and in a shared plate lane by lane.

    Args:
        p: the unnormalized model, a program with its observations.
        q: the guide.
        stick_the_landing: drop the zero-mean score of `q`'s parameters inside `log q` (pathwise sites only); at the
            exact posterior the gradient noise vanishes.
        analytic_kl: replace the sampled log-ratio by the closed-form KL at each site where numpyro knows it and the
            model samples its sites in the guide's order.
        rao_blackwell: drop independent costs from score multipliers.

    Returns:
        A scalar estimate of the bound.

    Raises:
        RuntimeError: outside `E`.
        ValueError: if sites or supports of model and guide do not match, or an option does not apply.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> p = vi.program(model)(1.0)
        >>> q = vi.program(lambda: vi.sample("x", dist.Normal(0.8, 0.2**0.5)))()  # the exact posterior
        >>> round(float(vi.E(lambda: vi.elbo(p, q))(key=jax.random.key(0))), 4)
        -1.4305

    Source: Roeder, Wu & Duvenaud, "Sticking the Landing", NeurIPS 2017; dependency structure after Schulman et al.,
    "Gradient Estimation Using Stochastic Computation Graphs", NeurIPS 2015, theorem 1.
    """
    frame = require_frame("elbo")
    if stick_the_landing and analytic_kl:
        raise ValueError("`stick_the_landing` must be False with `analytic_kl`; got both. They exclude each other.")
    if stick_the_landing:
        _require_pathwise(q, "stick_the_landing")
    value, log_p, log_q, p_record, q_record = draw_and_weigh(p, q)
    if analytic_kl:
        return _analytic(p_record, q_record)
    if stick_the_landing:
        log_q = frozen_log_density(q, value)
    out = log_p - log_q
    terms = None
    if rao_blackwell and not stick_the_landing and p_record is not None and q_record is not None:
        terms = elbo_terms(frame, p, q, p_record, q_record)
    return frame.decompose(out, terms)


def _require_pathwise(q: Any, option: str) -> None:
    """Refuse estimators that need reparametrized sites on guides with others."""
    decisions = _probe(q)
    for decision in decisions.values():
        if not isinstance(decision.strategy, Reparam):
            raise ValueError(  # noqa: TRY004 - a fact about the program
                f"`{option}` must be used with reparametrized sites only; got {type(decision.strategy).__name__} at "
                f"site {decision.address.split('/')[-1]!r} ({decision.distribution})."
            )


def _probe(q: Any) -> dict:
    """What the guide's sites would do as particles."""
    return probe(lambda: simulate(q))


def _analytic(p_record: Record | None, q_record: Record | None) -> Float[Array, ""]:
    """Log p(observed) - KL site by site; the rest sampled."""
    if p_record is None or q_record is None:
        raise ValueError("`analytic_kl` must be used with programs on both sides; got another measure.")
    guide_order = [name for name, site in q_record.sites.items() if not site.observed]
    position = {name: i for i, name in enumerate(guide_order)}
    out = jnp.zeros(())
    latest = -1
    known = 0
    for name, site in p_record.sites.items():
        if site.observed or name not in q_record.sites:
            out = out + scaled(site)
            continue
        guide = q_record.sites[name]
        # A site whose draw comes earlier in the guide than in the model may be conditioned on other values there.
        ratio = None
        if latest < position[name]:
            ratio = _expected_ratio(site, guide)
        latest = max(latest, position[name])
        if ratio is None:
            out = out + scaled(site) - scaled(guide)
        else:
            known += 1
            out = out + scaled(site._replace(log_prob=ratio))
    for name, guide in q_record.sites.items():
        if name not in p_record.sites:
            out = out - scaled(guide)
    check(known > 0, "analytic_kl", "True only where some site has a closed-form KL", "none of them has")
    return out


def _expected_ratio(model: Site, guide: Site) -> Array | None:
    """E_q [log p - log q] of a site lane by lane; None where numpyro has no closed form, or the scales differ.

    Lanes that are masked on one side only keep their draw: there the other side's log-density is not part of a KL.
    """
    if model.distribution is None or guide.distribution is None or not _same_scale(model.scale, guide.scale):
        return None
    try:
        kl = kl_divergence(unmask(guide.distribution), unmask(model.distribution))
    except NotImplementedError:  # what numpyro raises where it has no closed form; the caller draws instead
        return None
    if not (_has_mask(model.distribution) or _has_mask(guide.distribution)):
        return -kl
    if jnp.shape(kl) != jnp.shape(model.log_prob):
        return None
    # Masks below `to_event` are within one log-density and cannot be told apart from outside.
    both = _counts(model.distribution, kl) & _counts(guide.distribution, kl)
    return jnp.where(both, -kl, jnp.asarray(model.log_prob) - jnp.asarray(guide.log_prob))


def _same_scale(first: object, second: object) -> bool:
    """Whether two scales are known to be equal."""
    if first is None or second is None:
        return first is second
    if not (is_concrete(first) and is_concrete(second)):
        return first is second
    return bool(np.array_equal(np.asarray(first), np.asarray(second)))


def _has_mask(distribution: Distribution) -> bool:
    return unmask(distribution) is not distribution


def _counts(distribution: Distribution, kl: Array) -> Array:
    """True in lanes that no mask hides; False everywhere where a mask lies below `to_event`."""
    mask = mask_of(distribution)
    while isinstance(distribution, (MaskedDistribution, ExpandedDistribution)):
        distribution = distribution.base_dist
    if _has_mask(distribution):
        return jnp.zeros(jnp.shape(kl), bool)
    return jnp.broadcast_to(True if mask is None else mask, jnp.shape(kl))


# --- several particles --------------------------------------------------------------------------------------------


def log_mean_exp(x: Any) -> Any:
    """Log mean exp over the leading axis; where all entries are -inf the gradient is zero, not NaN."""
    top = stop_gradient(jnp.max(x, 0))
    alive = top > -jnp.inf
    shift = jnp.where(alive, top, 0.0)
    inner = jnp.mean(jnp.exp(x - shift), 0)
    return jnp.where(alive, jnp.log(jnp.where(alive, inner, 1.0)) + shift, -jnp.inf)


def iwelbo(p: Any, q: Any, num_particles: int, estimator: str = "auto", plate: str | None = None) -> Float[Array, ""]:
    r"""The importance-weighted bound $E \log \frac1K\sum_k w_k$, $w = p/q$; maximize.

    Args:
        p: the unnormalized model.
        q: the guide.
        num_particles: K.
        estimator: "pathwise" (reparametrized sites only), "dreg" (doubly reparametrized: lower variance, exact
            log-densities and reparametrized sites only), "vimco" (score sites with leave-one-out baselines over the
            particles), or "auto": pathwise sites as they are, discrete ones enumerated jointly while
            `K^paths <= max_paths`, else leave-one-out.
        plate: a plate every site is in; the bound is then the sum over its members of their own bounds,
            $\sum_n \log\frac1K\sum_k w_{nk}$, with the scale of subsampling outside the logarithm.

    Returns:
        A scalar estimate of the bound.

    Raises:
        RuntimeError: outside `E`.
        ValueError: for unsuitable sites, or for subsampling without `plate`.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> p = vi.program(model)(1.0)
        >>> q = vi.program(lambda: vi.sample("x", dist.Normal(0.8, 0.2**0.5)))()  # the exact posterior
        >>> round(float(vi.E(lambda: vi.iwelbo(p, q, 3))(key=jax.random.key(0))), 4)
        -1.4305

    Source: Burda, Grosse & Salakhutdinov, ICLR 2016; VIMCO: Mnih & Rezende, ICML 2016, equations 10-11; DReG: Tucker
    et al., ICLR 2019, equation 8.
    """
    check_choice("estimator", estimator, ("auto", "pathwise", "dreg", "vimco"))
    check_count("num_particles", num_particles)
    if estimator == "dreg":
        check(plate is None, "plate", "None with the estimator 'dreg'", plate)
        return _dreg(p, q, num_particles)
    return _multi(p, q, num_particles, log_mean_exp, estimator, plate)


def renyi(
    p: Any, q: Any, alpha: Shaped[Array, ""] | float, num_particles: int, *, plate: str | None = None
) -> Float[Array, ""]:
    r"""The Renyi bound $\frac1{1-\alpha}\,E\log\frac1K\sum_k w_k^{1-\alpha}$; maximize.

    $\alpha \to 1$ is the ELBO, $\alpha = 0$ the importance-weighted bound. The K-sample form is its own objective.

    Args:
        p: the unnormalized model.
        q: the guide.
        alpha: the order.
        num_particles: K.
        plate: as in `iwelbo`.

    Returns:
        A scalar estimate of the bound.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> p = vi.program(model)(1.0)
        >>> q = vi.program(lambda: vi.sample("x", dist.Normal(0.8, 0.2**0.5)))()  # the exact posterior
        >>> round(float(vi.E(lambda: vi.renyi(p, q, 0.5, 3))(key=jax.random.key(0))), 4)
        -1.4305

    Source: Li & Turner, "Renyi Divergence Variational Inference", NeurIPS 2016, equations 6 and 9.
    """
    check_count("num_particles", num_particles)
    if is_concrete(alpha) and float(alpha) == 1.0:
        return _multi(p, q, num_particles, lambda x: jnp.mean(x, 0), "auto", plate)
    power = 1 - jnp.asarray(alpha)
    return _multi(p, q, num_particles, lambda x: log_mean_exp(power * x) / power, "auto", plate)


def cubo(p: Any, q: Any, n: float, num_particles: int) -> Float[Array, ""]:
    r"""The chi upper bound $\frac1n\log E_q w^n$, its K-sample form; minimize. Equals `renyi(p, q, 1 - n, K)`.

    The logarithm makes the K-sample form an underestimate in expectation; it approaches the bound as K grows.

    Args:
        p: the unnormalized model.
        q: the guide.
        n: the order, at least 1.
        num_particles: K.

    Returns:
        A scalar estimate of the bound.

    Raises:
        ValueError: for an order below 1.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> p = vi.program(model)(1.0)
        >>> q = vi.program(lambda: vi.sample("x", dist.Normal(0.8, 0.2**0.5)))()  # the exact posterior
        >>> round(float(vi.E(lambda: vi.cubo(p, q, 2.0, 3))(key=jax.random.key(0))), 4)
        -1.4305

    Source: Dieng et al., "Variational Inference via chi Upper Bound Minimization", NeurIPS 2017, equation 4.
    """
    check_interval("n", n, 1)
    return renyi(p, q, 1 - n, num_particles)


def _multi(p: Any, q: Any, size: int, functional: Callable, estimator: str, plate: str | None) -> Any:
    """A functional of K log-weights, with the best admissible treatment of discrete sites."""
    frame = require_frame("iwelbo")
    decisions = _probe(q).values()
    if estimator == "pathwise":
        _require_pathwise(q, "estimator='pathwise'")
    stopping = [
        d
        for d in decisions
        if not isinstance(d.strategy, (AbstractLocalStrategy, RLOO)) or (d.reason == LEAVE_ONE_OUT and d.finite)
    ]
    named = [d for d in stopping if d.reason != LEAVE_ONE_OUT]
    if estimator == "vimco" and named:
        raise ValueError(
            f"`estimator='vimco'` must meet score or reparametrized sites; got {type(named[0].strategy).__name__} at "
            f"{named[0].address!r}. Use estimator='auto'."
        )
    default_enum = stopping and frame.context.options.enumerate and not frame.inner and estimator == "auto"
    if named or default_enum:
        parts = one_by_one(lambda: _log_weight(p, q, plate), size)
        return _finish(functional(jnp.stack([w for w, _ in parts])), parts[0][1])

    def lane(index: Any) -> Any:
        del index
        return _log_weight(p, q, plate)

    with frame.falling_back(Score()):
        (log_w, scale), scores = looped_apart("particles", lane, size, plate)
    bound = functional(log_w)
    scale = None if scale is None else scale[0]
    if scores is None:
        return frame.decompose(_finish(bound, scale), None)
    return _with_baselines(frame, functional, log_w, scores, bound, scale)


def _finish(bound: Any, scale: Any) -> Any:
    """Sum over the plate, with its subsampling scale."""
    out = jnp.sum(bound)
    return out if scale is None else scale * out


def _log_weight(p: Any, q: Any, plate: str | None) -> tuple[Any, Any]:
    """One particle's log-weight: a scalar, or one per member of the plate, and the plate's scale."""
    _, log_p, log_q, p_record, q_record = draw_and_weigh(p, q)
    if plate is not None:
        if p_record is None or q_record is None:
            raise ValueError("`plate` must be used with programs on both sides; got another measure.")
        parts = [along_plate(s.log_prob, s.plates, plate) for s in p_record.sites.values()]
        parts += [-along_plate(s.log_prob, s.plates, plate) for s in q_record.sites.values()]
        scales = [s.scale for s in p_record.sites.values() if s.scale is not None]
        return sum(parts[1:], parts[0]), (jnp.asarray(scales[0]) if scales else None)
    for record in (p_record, q_record):
        for name, site in () if record is None else record.sites.items():
            if site.scale is not None:
                raise ValueError(
                    f"A multi-sample bound must see unscaled sites; got a scale at {name!r}: a scaled weight is not a "
                    "weight. Name the subsampled plate, iwelbo(..., plate=...), to scale outside the logarithm."
                )
    return log_p - log_q, None


def _with_baselines(frame: Any, functional: Callable, log_w: Any, scores: Any, bound: Any, scale: Any) -> Any:
    """Leave-one-out baselines over particles: replace one log-weight by the mean of the others."""
    size = log_w.shape[0]
    out = _finish(bound, scale)
    factor = 1.0 if scale is None else scale
    if size > 1:
        fixed = stop_gradient(log_w)
        others = (jnp.sum(fixed, 0) - fixed) / (size - 1)
        held_out = jax.vmap(lambda k: functional(fixed.at[k].set(others[k])))(jnp.arange(size))
        baseline = factor * jnp.where(jnp.isfinite(held_out), held_out, 0.0)
        frame.zeros.append(jnp.sum(stop_gradient(baseline) * (1 - dice_factor(scores))))
    together = jnp.sum(scores, 0)
    term = Term(factor * bound, with_rest(frame, together), None)
    frame.scores.append(ScoreTerm("particles", together, ()))
    return frame.decompose(out, None if frame.group else [term])


def _dreg(p: Any, q: Any, size: int) -> Any:
    """Doubly reparametrized gradients: squared weights on the path, plain weights on the model's own parameters."""
    _require_pathwise(q, "estimator='dreg'")

    def lane(index: Any) -> tuple[Any, Any, Any]:
        del index
        value, log_p, log_q, _, _ = draw_and_weigh(p, q)
        path = frozen_log_density(p, value) - frozen_log_density(q, value)
        model = as_measure(p).log_density(jax.tree.map(stop_gradient, value))
        return log_p - log_q, path, model

    (log_w, path, model), _ = looped_apart("particles", lane, size)
    log_w = stop_gradient(log_w)
    weights = jax.nn.softmax(log_w)
    gradient = jnp.sum(weights**2 * (path - stop_gradient(path)) + weights * (model - stop_gradient(model)))
    return log_mean_exp(log_w) + gradient
