"""Reports on an expectation: its strategies, its variance and cost, and checks of its use."""

import time
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Key, PyTree

from genkit._core._checks import check, check_count, check_key
from genkit.vi._programs._expectation import E
from genkit.vi._runtime._frame import changed
from genkit.vi._strategies._alternatives import RLOO, Enum, LocalExpectation
from genkit.vi._strategies._mvd import MVD
from genkit.vi._strategies._policy import Decision, logging_decisions
from genkit.vi._strategies._single import Reparam, Score


def explain(fn: Callable, *args: PyTree, key: Key[Array, ""]) -> list[Decision]:
    """List the strategy of every site with its reason; traces `fn`, runs nothing.

    Args:
        fn: as for `E`.
        *args: its arguments.
        key: typed PRNG key.

    Returns:
        One record per site: address, distribution, strategy, reason, and whether its support is finite.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> fn = lambda p: 2.0 * vi.sample("b", dist.Bernoulli(p))
        >>> [(d.address, type(d.strategy).__name__) for d in vi.explain(fn, 0.3, key=jax.random.key(0))]
        [('b', 'Enum')]
    """
    check_key(key)
    with logging_decisions() as log:
        eqx.filter_eval_shape(lambda a: E(fn)(*a, key=key), args)
    return list(log.values())


class VarianceRow(NamedTuple):
    """One line of a variance report.

    `variance` is the total variance of the gradient, `seconds` the time of one estimate within a batch; `site` is empty
    for the program as it is.
    """

    site: str
    strategy: str
    variance: float
    seconds: float

    @property
    def work(self) -> float:
        """Variance times time: what an estimate of given accuracy costs."""
        return self.variance * self.seconds


class VarianceReport(NamedTuple):
    """The table of a variance report and what it suggests."""

    rows: list[VarianceRow]
    suggestion: str

    def __str__(self) -> str:
        lines = [f"{'site':24} {'strategy':12} {'variance':>12} {'us':>9} {'product':>12}"]
        for row in self.rows:
            site = row.site or "(as configured)"
            lines.append(f"{site:24} {row.strategy:12} {row.variance:12.4g} {row.seconds * 1e6:9.2f} {row.work:12.4g}")
        return "\n".join([*lines, self.suggestion])


def variance_report(fn: Callable, *args: PyTree, key: Key[Array, ""], num_samples: int = 256) -> VarianceReport:
    """Measure gradient variance and time of `E(fn)`, as it is and with other strategies at each site in turn.

    Args:
        fn: as for `E`; gradients are taken in the floating arrays of `args`.
        *args: its arguments.
        key: typed PRNG key.
        num_samples: gradient draws per measurement, at least 2.

    Returns:
        The rows and a suggestion: the change with the smallest variance times time.

    Raises:
        ValueError: if `args` hold no floating array.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> fn = lambda p: 2.0 * vi.sample("b", dist.Bernoulli(p))
        >>> report = vi.variance_report(fn, 0.3, key=jax.random.key(0), num_samples=8)
        >>> report.rows[0].variance  # summed over the support: no variance
        0.0
    """
    check_key(key)
    check_count("num_samples", num_samples, 2)
    moving, fixed = eqx.partition(args, eqx.is_inexact_array_like)
    check(bool(jax.tree.leaves(moving)), "args", "a tree with at least one floating array", "none")
    moving = jax.tree.map(jnp.asarray, moving)
    key_explain, key_draws = jr.split(key)
    keys = jr.split(key_draws, num_samples)

    def measure(table: dict) -> tuple[float, float]:
        def gradient(m: PyTree, one: Key[Array, ""]) -> PyTree:
            return jax.grad(lambda m: E(fn)(*eqx.combine(m, fixed), key=one))(m)

        with changed(overrides=table):
            run = jax.jit(lambda m, ks: jax.vmap(lambda one: gradient(m, one))(ks)).lower(moving, keys).compile()
        draws = jax.block_until_ready(run(moving, keys))
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(run(moving, keys))
            times.append(time.perf_counter() - begin)
        variance = sum(float(np.sum(np.var(np.asarray(d, np.float64), 0, ddof=1))) for d in jax.tree.leaves(draws))
        return variance, float(np.median(times)) / num_samples

    base = VarianceRow("", "", *measure({}))
    rows = [base]
    for decision in explain(fn, *args, key=key_explain):
        for candidate in (Reparam(), Enum(), LocalExpectation(), MVD(), RLOO(2), Score()):
            if type(candidate) is type(decision.strategy):
                continue
            try:
                row = VarianceRow(decision.address, type(candidate).__name__, *measure({decision.address: candidate}))
            except ValueError:  # the strategy cannot serve this distribution, or enumerates too much
                continue
            rows.append(row)
    best = min(rows, key=lambda row: row.work)
    if best is base or best.work >= 0.8 * base.work:
        return VarianceReport(rows, "Keep the strategies: no single change lowers variance times time by a fifth.")
    ratio = base.work / best.work if best.work > 0 else float("inf")
    return VarianceReport(rows, f"Give {best.site!r} {best.strategy}(): {ratio:.1f} times less variance times time.")


def debug(fn: Callable) -> Callable:
    """Run a function that uses `E` with checks: NaN densities name their site, nonlinear use of an estimate raises.

    An estimate `E(...)` is unbiased only where it enters linearly: `log(E(...))` has a biased value and gradient. The
    check adds a probe to every estimate closed while `fn` runs and looks at the second derivative of the result.

    Args:
        fn: a function returning a real scalar.

    Returns:
        The same function with the checks; slower, meant for a first run.

    Raises:
        ValueError: from the call, if the result depends nonlinearly on an estimate.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> mean = lambda p: vi.E(lambda: 1.0 + vi.sample("b", dist.Bernoulli(p)))(key=jax.random.key(0))
        >>> round(float(vi.debug(lambda p: 2.0 * mean(p))(0.3)), 4)
        2.6
    """

    def checked(*args: PyTree, **kwargs: PyTree) -> Array:
        num_estimates = 0

        def shifted(shifts: Array | None) -> Array:
            nonlocal num_estimates
            num_estimates = 0

            def shift(value: Array) -> Array:
                nonlocal num_estimates
                index = num_estimates
                num_estimates += 1
                return value if shifts is None else value + shifts[index]

            with changed(probe=shift):
                return fn(*args, **kwargs)

        with changed(check_traced=True):
            value = shifted(None)
            if num_estimates == 0:
                return value
            second = jnp.diagonal(jax.hessian(shifted)(jnp.zeros(num_estimates)))
        nonlinear = jnp.abs(second) > 1e-6 * (1 + jnp.abs(value))  # above what rounding leaves
        message = (
            "An estimate made by `E` must enter the objective linearly; it is used nonlinearly (log, square, "
            "exp, ...). Move the nonlinear function inside, or let one `E` surround the whole."
        )
        if isinstance(nonlinear, Tracer):
            return eqx.error_if(value, jnp.any(nonlinear), message)
        if bool(jnp.any(nonlinear)):
            raise ValueError(message)
        return value

    return checked
