"""Data as arguments of compiled programs, so that equal models and shapes compile once."""

import equinox as eqx
import jax
import numpyro

from genkit.inference._problem import Problem, improper_start


_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class TracedProblem(eqx.Module):
    """A problem whose arrays are arguments of compiled programs.

    Args:
        problem: model and data.
    """

    problem: Problem


class ConstantProblem:
    """A problem whose data are constants of compiled programs; it equals itself only, so that none is used twice.

    Args:
        problem: model and data.
        reason: the error that was raised with traced data.
    """

    def __init__(self, problem: Problem, reason: str):
        self.problem = problem
        self.reason = reason


def as_compiled_argument(problem: Problem) -> TracedProblem | ConstantProblem:
    """The problem in the form that compiled programs take; they read its `problem`.

    Args:
        problem: model and data.

    Returns:
        A `TracedProblem`, or a `ConstantProblem` where the model needs the values of its data while it is traced
        (it calls NumPy on them or branches on them) or where an argument cannot be hashed.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def model(y):
        ...     numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> type(gk.inference.as_compiled_argument(gk.Problem(model, (jnp.ones(3),)))).__name__
        'TracedProblem'
    """

    def run(problem: Problem) -> None:
        start = numpyro.handlers.substitute(problem.model, substitute_fn=improper_start)
        with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=0):
            start(*problem.args, **problem.kwargs)

    try:
        hash(tuple(leaf for leaf in jax.tree.leaves(problem) if not eqx.is_array_like(leaf)))
    except TypeError as error:
        return ConstantProblem(problem, str(error))
    try:
        eqx.filter_eval_shape(run, problem)
    except _NEEDS_VALUES as error:
        return ConstantProblem(problem, type(error).__name__)
    except Exception:  # a wrong model is told by the method, in its own words
        return TracedProblem(problem)
    return TracedProblem(problem)
