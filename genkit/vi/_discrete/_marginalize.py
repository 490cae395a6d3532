"""Models with their discrete latent sites summed out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro
from jaxtyping import Array, Key, PyTree

from genkit._core._checks import check, check_count, check_key, describe, describe_type
from genkit.inference import Posterior, Problem, discrete_sites, trace_at
from genkit.vi._discrete._chain import sum_chain
from genkit.vi._discrete._elimination import Factor, Step, WidthError, aligned, draw_states, eliminate
from genkit.vi._discrete._graph import Costs, Graph, build_graph, reads_of, trace_costs
from genkit.vi._discrete._visible import SummedOut, Visible, key_at_hand
from genkit.vi._discrete._world import Found, Given, Settings, run_world
from genkit.vi._runtime._frame import MAX_PATHS, current_frame


class Marginal(eqx.Module):
    """A numpyro model without its discrete latent sites; `marginalize` makes it.

    Args:
        model: the model.
        sites: the sites to sum out, None for all.
        bounds: pairs of a site and the largest value to sum over.
        max_paths: entries that a table may have.
        is_mode: maximize instead of summing, for the most probable states.
    """

    model: Callable
    sites: tuple[str, ...] | None = eqx.field(static=True, default=None)
    bounds: tuple[tuple[str, int], ...] = eqx.field(static=True, default=())
    max_paths: int = eqx.field(static=True, default=MAX_PATHS)
    is_mode: bool = eqx.field(static=True, default=False)

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """Run the model for numpyro's handlers.

        Args:
            *args: the model's arguments.
            **kwargs: its keyword arguments.

        Returns:
            What the model returns.
        """
        run = _Run(self, lambda: self.model(*args, **kwargs))
        return run()


class _Run:
    """One call of a marginalized model."""

    def __init__(self, marginal: Marginal, call: Callable[[], Any]):
        chosen = None if marginal.sites is None else frozenset(marginal.sites)
        self.call = call
        self.settings = Settings(chosen, dict(marginal.bounds), marginal.max_paths, marginal.is_mode, sum_chain)

    def __call__(self) -> Any:
        plan = self.plan()
        self.check_names(plan)
        if not plan.specs and not plan.loops:
            return self.call()
        visible = Visible(self.settings, self.tainted)
        with visible:
            result = self.call()
        graph, factors, steps = self.sums(plan, visible.given)
        self.publish(visible, graph, factors)
        key = key_at_hand()
        if key is not None and current_frame() is None:
            for name, value in self.draws(visible.given, graph, steps, key).items():
                numpyro.deterministic(name, value)
        return result

    def plan(self) -> Found:
        """Find what there is to sum out, and the sites whose densities change with it."""
        while True:
            found = self.abstract()
            references = {name: spec.reference for name, spec in found.specs.items()}
            tokens = {name: jnp.zeros(()) for name in found.tokens}
            traced, found = self.traced(None, references, tokens)
            reads = reads_of(traced, [*references, *tokens])
            used = {name for names in reads.values() for name in names if name in tokens}
            if used:
                # What comes after such a loop depends on its states: write it out and sum over everything.
                self.settings = self.settings._replace(unrolled=self.settings.unrolled | used)
                continue
            tainted = {cost for cost, names in reads.items() if names} | found.forced
            self.tainted = frozenset(site for cost in tainted for site in found.sites(cost))
            return found

    def traced(
        self, given: Given | None, references: Mapping[str, Array], tokens: Mapping[str, Array]
    ) -> tuple[Costs, Found]:
        """The log-densities as a function of the discrete values and of a mark for each loop."""
        kept: list[Found] = []

        def costs(values: dict[str, Array]) -> dict[str, Array]:
            states = {name: values[name] for name in references}
            marks = {name: values[name] for name in tokens}
            kept.append(run_world(self.call, self.settings, given, states, tokens=marks))
            return kept[-1].costs

        found = trace_costs(costs, {**references, **tokens})
        return found, kept[-1]

    def abstract(self) -> Found:
        """A run for shapes only."""
        kept: list[Found] = []

        def run() -> None:
            kept.append(run_world(self.call, self.settings, None, {}))

        jax.eval_shape(run)
        return kept[-1]

    def check_names(self, found: Found) -> None:
        """Refuse names that no site answers to."""
        known = found.discrete
        wanted = set(self.settings.chosen or ()) | set(self.settings.bounds)
        for name in sorted(wanted - known):
            raise ValueError(
                f"`sites` must name discrete latent sites of the model; got {name!r} (its discrete sites: "
                f"{', '.join(sorted(known)) or 'none'})."
            )

    def sums(self, plan: Found, given: Given) -> tuple[Graph, list[Factor], list[Step]]:
        """Sum out the discrete sites at given values of the others."""
        references = {name: spec.reference for name, spec in plan.specs.items()}
        traced, found = self.traced(given, references, {})
        max_paths = self.settings.max_paths
        try:
            graph = build_graph(traced, found.specs, found.scales, max_paths=max_paths)
            factors, steps = eliminate(
                graph.factors, graph.variables, max_paths=max_paths, is_mode=self.settings.is_mode
            )
        except WidthError as error:
            raise ValueError(_too_wide(error, max_paths)) from None
        read = {site for factor in graph.factors for site in factor.sites}
        rest = [name for name in sorted(found.forced) if name not in read]
        if rest:
            for name, cost in zip(rest, traced.evaluate(rest)(references), strict=True):
                factors.append(Factor(jnp.sum(cost), (), found.scales[name], frozenset([name])))
        named = [
            factor._replace(sites=frozenset(site for cost in factor.sites for site in found.sites(cost)))
            for factor in factors
        ]
        return graph, named, steps

    def draws(self, given: Given, graph: Graph, steps: list[Step], key: Key[Array, ""]) -> dict[str, Array]:
        """Values of the discrete sites, given everything else."""
        key_states, key_loops = jr.split(key)
        is_mode = self.settings.is_mode
        states = draw_states(steps, {}, graph.variables, key=None if is_mode else key_states)
        values = {name: graph.value_of(name, state) for name, state in states.items()}
        found = run_world(self.call, self.settings, given, values, key=key_loops)
        stacked: dict[str, Array] = {}
        written: dict[str, dict[int, Array]] = {}
        for name, value in values.items():
            if name in found.steps:
                site, step = found.steps[name]
                written.setdefault(site, {})[step] = value
            else:
                stacked[name] = value
        for site, parts in written.items():
            stacked[site] = jnp.stack([parts[step] for step in sorted(parts)])
        return {**stacked, **found.draws}

    def publish(self, visible: "Visible", graph: Graph, factors: list[Factor]) -> None:
        """Show the observed sites, and the density of the sums: at the one site it belongs to, else as a factor."""
        attached: set[str] = set()
        for number, factor in enumerate(factors):
            observed = [name for name in factor.sites if name in visible.observed]
            marginal = None
            if len(observed) == 1 and observed[0] not in attached:
                marginal = _by_member(visible.observed[observed[0]], factor, graph)
            if marginal is None:
                self.add_factor(number, factor)
                continue
            attached.add(observed[0])
            visible.show(observed[0], SummedOut(visible.observed[observed[0]]["fn"], marginal), factor.scale)
        for name, msg in visible.observed.items():
            if name not in attached:
                visible.show(name, msg["fn"].mask(False), msg["scale"])

    def add_factor(self, number: int, factor: Factor) -> None:
        """Add a density that belongs to no single site."""
        value = jnp.sum(factor.table)
        if factor.scale is not None:
            value = factor.scale * value
        # Two sums may be over the same sites: the first step of a loop has one of its own.
        numpyro.factor(f"sum {number} over " + ", ".join(sorted(factor.sites)), value)


def _by_member(msg: dict, factor: Factor, graph: Graph) -> Array | None:
    """The density of a sum by member of an observed site's batch, where its lanes are those of the batch."""
    lanes = graph.lanes.get(msg["name"])
    if lanes is None:
        return None
    shape = msg["fn"].batch_shape
    inside = {axis: lane for axis, lane in lanes.items() if axis < len(shape)}
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    if sorted(inside) != wide or set(inside.values()) != set(factor.dims):
        return None
    return aligned(factor, [inside[axis] for axis in wide]).reshape(shape)


def _too_wide(error: WidthError, max_paths: int) -> str:
    names = ", ".join(map(repr, error.variables))
    size = "plates that cross" if error.size < 0 else f"{error.size} joint states"
    return (
        f"`model` must have discrete sites that can be summed out within max_paths={max_paths} joint states; got "
        f"{size} where {names} meet. Members that meet no other belong in a `numpyro.plate` and must be read member by "
        "member; otherwise raise `max_paths`, or keep a site latent with `sites=`."
    )


def marginalize(
    model: Callable, sites: Sequence[str] | Mapping[str, int] | None = None, *, max_paths: int = MAX_PATHS
) -> Callable:
    r"""Sum the discrete latent sites of a numpyro model out.

    The result is a numpyro model with the density :math:`p(x, y) = \sum_z p(x, y, z)`, for any method of `gk.infer` and
    for numpyro itself. The user's code runs unchanged: it sees one value of a discrete site at a time. Which densities
    read which site is read off the traced program. Members of a plate that do not meet cost K runs, not K ** n; a loop
    whose carry holds the state of the step before costs K ** 2 densities a step; everything else is summed in the order
    that makes the smallest tables.

    Under a handler that gives keys the discrete sites are drawn from their distribution given everything else, as
    deterministic sites. A member that is masked away contributes nothing.

    Args:
        model: a numpyro model.
        sites: the sites to sum out, or a dict from sites to the largest value to sum over (for counts without an end);
            None for all discrete latent sites.
        max_paths: most joint states that may meet in one table.

    Returns:
        The model without these sites.

    Raises:
        TypeError: if `model` is not callable.
        ValueError: when the model is run, for sites that are not there, supports without an end and sums that are too
            large; the message names the sites.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def coin(y):
        ...     z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...     numpyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)
        >>> round(float(vi.program(vi.marginalize(coin))(1.5).log_density({})), 4)
        -1.6282

    Source: Obermeyer et al., "Tensor variable elimination for plated factor graphs", ICML (2019), section 4.
    """
    check(callable(model), "model", "a numpyro model (a function)", describe(model))
    check_count("max_paths", max_paths)
    if isinstance(sites, str):
        raise TypeError(f"`sites` must be a list of names, or a dict; got the string {sites!r}.")
    bounds: tuple[tuple[str, int], ...] = ()
    chosen = None
    if isinstance(sites, Mapping):
        for name, bound in sites.items():
            check_count(f"sites[{name!r}]", bound, 0)
        bounds = tuple(sites.items())
    elif sites is not None:
        chosen = tuple(sites)
    return Marginal(model, chosen, bounds, max_paths)


def infer_discrete(
    model: Callable,
    posterior: Posterior,
    *args: PyTree,
    key: Key[Array, ""],
    temperature: int = 1,
    **kwargs: PyTree,
) -> dict[str, Array]:
    """Draw the discrete sites that were summed out, given each draw of the posterior.

    Args:
        model: the model, or `marginalize(model)`.
        posterior: draws of its other latent sites.
        *args: the model's arguments.
        key: typed PRNG key.
        temperature: 1 draws from the joint distribution of the discrete sites; 0 gives their most probable joint value.
        **kwargs: the model's keyword arguments.

    Returns:
        Values by site, with the posterior's leading axes.

    Raises:
        TypeError: if `posterior` is no posterior.
        ValueError: for another temperature.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x + 9.0 * z, 1.0), obs=y)
        >>> posterior = gk.infer(gk.Problem(model, (9.0,)), gk.mcmc.NUTS(50, 50, num_chains=1), key=jax.random.key(0))
        >>> z = gk.vi.infer_discrete(model, posterior, 9.0, key=jax.random.key(1))["z"]
        >>> z.shape, int(z.min())
        ((1, 50), 1)
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(f"`posterior` must be a gk.Posterior; got {describe_type(posterior)}.")
    check_key(key)
    check(temperature in (0, 1), "temperature", "0 (the most probable values) or 1 (draws)", temperature)
    base = model if isinstance(model, Marginal) else marginalize(model)
    assert isinstance(base, Marginal)
    is_mode = temperature == 0
    marginal = Marginal(base.model, base.sites, base.bounds, base.max_paths, is_mode)
    problem = Problem(marginal, args, kwargs)
    lead = len(posterior.dims)
    shape = jnp.shape(jax.tree.leaves(posterior.samples)[0])[:lead]
    flat = jax.tree.map(lambda x: jnp.reshape(x, (-1, *jnp.shape(x)[lead:])), posterior.samples)
    names = discrete_sites(Problem(base.model, args, kwargs))
    flat = {name: value for name, value in flat.items() if name not in names}

    def one(values: dict[str, PyTree], key: Key[Array, ""]) -> dict[str, Array]:
        trace = trace_at(problem, {**posterior.params, **values}, key=key)
        drawn = [name for name in names if name in trace and trace[name]["type"] == "deterministic"]
        return {name: trace[name]["value"] for name in drawn}

    with jax.debug_key_reuse(False):  # numpyro's handlers split one key several times
        drawn = eqx.filter_jit(jax.vmap(one))(flat, jr.split(key, jax.tree.leaves(flat)[0].shape[0]))
    return jax.tree.map(lambda x: jnp.reshape(x, (*shape, *x.shape[1:])), drawn)
