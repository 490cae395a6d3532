"""Samplers: what turns a model and keys into draws."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Key

from ._checks import check, check_choice, describe, is_concrete
from ._draw import LOOP, Draw
from ._draws import Draws
from ._guidance import Guidance, Hooks, collect_hooks
from ._runner import PLANS, Runner, Unguided
from ._runner_static import Patterns, static_patterns
from ._table import Table


class AbstractSampler(eqx.Module):
    """Draws from a model; pure and un-jitted, so that it composes with `jit`, `vmap`, `grad` and `scan`.

    `genkit.sample` calls it in batches and compiles it. Samplers that take a guidance keep it in a field `guidance`,
    `None` where there is none; samplers whose draws interact in blocks say so in an attribute `block_size`; an
    attribute `levels`, the noise levels at which the model is asked, lets `genkit.sample` compare them with its range.
    """

    @abc.abstractmethod
    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: Any,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        """Draw one example per key.

        Args:
            model: what is sampled, for one example: a denoiser, a generator, a bridge.
            keys: one typed key per draw `(n,)`.
            cond: conditions with leading axis `n`, or `None`.
            x_init: initial states `(n, *shape)`; `None` draws them.
            shape: shape of one example.

        Returns:
            The draws.
        """


class Sampler(AbstractSampler):
    """The table-driven sampler: a fixed grid, an optional guidance, one compiled scan.

    Args:
        table: the sampler as data.
        guidance: a `Guidance`, `StepTransform` or `Population`, or a tuple of these; `None` for none.
        plan: how evaluations are skipped. `"dynamic"`: where no draw of the batch needs one, decided at run time, so
            that nothing recompiles. `"static"`: decided on the host from the grid, compiled once per pattern, without a
            branch. `"compact"`: also within a batch, by gathering the draws that need it. `"phases"`: as `"dynamic"`,
            but rows in which no draw needs more than the plain prediction run in a loop of their own, which holds
            nothing else and has no branch; not differentiable in reverse.
        fuse: evaluate the condition and its absence in one concatenated call instead of one after the other.
        noise: where the noise of stochastic tables comes from, such as `genkit.diffusion.BrownianNoise`; `None` for
            independent normals.
        patterns: which evaluations each row makes under a static plan; worked out from the grid if not given.

    Raises:
        ValueError: for an unknown plan, or a noise that the table cannot take.
        TypeError: if `table` or `guidance` is of another kind.

    Example:
        >>> import genkit as gk
        >>> sampler = gk.Sampler(gk.diffusion.ddim(gk.diffusion.karras(8, 0.01, 80.0)), plan="static")
        >>> sampler.table.nfe
        8
    """

    table: Table
    guidance: Any = None
    plan: str = eqx.field(static=True, default="dynamic", kw_only=True)
    fuse: bool = eqx.field(static=True, default=False, kw_only=True)
    noise: Callable | None = eqx.field(default=None, kw_only=True)
    patterns: Patterns | None = eqx.field(static=True, default=None, kw_only=True, repr=False)

    def __check_init__(self) -> None:
        """Refuse foreign objects and unknown plans."""
        if not isinstance(self.table, Table):
            raise TypeError(
                f"`table` must be a `genkit.Table`, such as `gk.diffusion.heun(grid)`; got {describe(self.table)}."
            )
        check_choice("plan", self.plan, PLANS)
        collect_hooks(self.guidance)
        suits = getattr(self.noise, "check_table", None)
        if suits is not None:
            suits(self.table)

    @property
    def block_size(self) -> int:
        """Number of consecutive draws that interact: the particles of a population, else 1."""
        population = collect_hooks(self.guidance).population
        return 1 if population is None else population.num_particles

    @property
    def levels(self) -> Float[np.ndarray, " calls"] | None:
        """The noise levels at which the model is asked; `None` where they are traced."""
        return self.table.levels

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: Any,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
        trajectory: bool = False,
    ) -> Draws:
        """Draw one example per key; see `AbstractSampler.draw`."""
        hooks = collect_hooks(self.guidance)
        _check_condition(hooks, cond)
        check(len(keys) % self.block_size == 0, "keys", f"a multiple of {self.block_size} (the population)", len(keys))
        x_init, _ = start(keys, jnp.asarray(self.table.sigma)[0], x_init, shape)
        guidance = Unguided() if hooks.guidance is None else hooks.guidance
        runner = Runner(model, guidance, self.plan, self.fuse)
        patterns = self._patterns(guidance, shape, cond) if self.plan == "static" else None
        seeds, impl = jax.random.key_data(keys), jax.random.key_impl(keys)
        loop = Draw(runner, hooks, seeds, cond, impl, trajectory, self.noise)
        value, tally, info, states = loop(self.table, x_init, patterns)
        return Draws(value, tally.executed, tally.logical, info, at_steps(self.table, states))

    def prepared(self, shape: tuple[int, ...], cond: Any) -> "Sampler":
        """This sampler with what must be decided on the host decided: the pattern of a static plan."""
        if self.plan != "static" or self.patterns is not None:
            return self
        guidance = collect_hooks(self.guidance).guidance
        patterns = self._patterns(Unguided() if guidance is None else guidance, shape, cond)
        return dataclasses.replace(self, patterns=patterns)

    def _patterns(self, guidance: Guidance, shape: tuple[int, ...], cond: Any) -> Patterns:
        """Which evaluations each row makes."""
        if self.patterns is not None:
            return self.patterns
        return static_patterns(guidance, self.table, shape, cond)


def start(
    keys: Key[Array, " n"], level: ArrayLike, x_init: Inexact[Array, " n *shape"] | None, shape: tuple[int, ...]
) -> tuple[Inexact[Array, " n *shape"], Key[Array, " n"]]:
    """The states a sampler starts from, drawn at the noise level `level` where none are given, and keys for the rest.

    Args:
        keys: one key per draw.
        level: noise level of the start, a scalar.
        x_init: states to start from, or `None`.
        shape: shape of one example.

    Returns:
        States `(n, *shape)`, and one further key per draw, the same whether states were given or not.
    """
    first, rest = (jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in (0, LOOP))
    if x_init is None:
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(first)
        x_init = jnp.asarray(level, noise.dtype) * noise
    return x_init, rest


def as_sampler(sampler: Any) -> AbstractSampler:
    """Wrap a bare table in a `Sampler`; samplers pass.

    Args:
        sampler: a `Table` or an `AbstractSampler`.

    Returns:
        A sampler.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(sampler, Table):
        return Sampler(sampler)
    if isinstance(sampler, AbstractSampler):
        return sampler
    raise TypeError(
        "`sampler` must be a `genkit.Table`, such as `gk.diffusion.heun(grid)`, or a genkit sampler, such as "
        f"`gk.Sampler(table, guidance)`; got {describe(sampler)}."
    )


def _check_condition(hooks: Hooks, cond: Any) -> None:
    """Refuse a guidance that compares a condition with its absence where there is none."""
    if hooks.guidance is None or cond is not None:
        return
    kinds = {slot.cond for slot in hooks.guidance.slots() if isinstance(slot.cond, str)}
    if {"given", "null"} <= kinds:
        raise ValueError(
            "`cond` must be given with a guidance that compares the condition with its absence; got None. "
            "Pass `cond=`, a scalar or one entry per draw."
        )


def at_steps(table: Table, states: Array | None) -> Array | None:
    """Of the states before each row and at the end, those at the levels of the grid."""
    if states is None or not is_concrete(table.step):
        return states
    return states[:, np.append(np.flatnonzero(np.diff(np.asarray(table.step), prepend=-1)), table.num_rows)]
