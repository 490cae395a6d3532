"""Samplers: what turns a model and keys into draws."""

import abc
import dataclasses
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Key, PyTree

from genkit._core._checks import check, check_choice, describe
from genkit._core._fields import fact_of
from genkit._core._known import is_known
from genkit.sampling._denoiser import check_signature
from genkit.sampling._draws import Draws
from genkit.sampling._guidance import Guidance, Unguided
from genkit.sampling._guided import compares_with_absence
from genkit.sampling._hooks import Hooks, collect_hooks
from genkit.sampling._loop import Draw
from genkit.sampling._part import AbstractPart
from genkit.sampling._runner import SKIPS, Runner
from genkit.sampling._state import LOOP, Batch
from genkit.sampling._static_patterns import Patterns, static_patterns
from genkit.sampling._table import Table


_DEFAULTS = MappingProxyType({"takes_guidance": False, "block_size": 1, "levels": None})


class AbstractSampler(eqx.Module):
    """Draws from a model; pure and un-jitted, so that it composes with `jit`, `vmap`, `grad` and `scan`.

    `genkit.sample` calls it in batches and compiles it. It asks a sampler for some facts, each with a default here:
    `takes_guidance`, whether it has a field `guidance` for the guidance of the call (`None` where there is none);
    `block_size`, the number of consecutive draws that interact; `levels`, the noise levels at which the model is asked,
    to be compared with its range (`None` where they are unknown).
    """

    if TYPE_CHECKING:  # the defaults are in `__getattr__`, so that a subclass may keep a fact in a field
        takes_guidance: ClassVar[bool]
        block_size: ClassVar[int]
        levels: ClassVar[Float[np.ndarray, " calls"] | None]

    def __getattr__(self, name: str):
        return fact_of(self, _DEFAULTS, name)

    def fitted_to(
        self, denoiser: Callable, *, cond: PyTree, shape: tuple[int, ...], key: Key[Array, ""]
    ) -> "AbstractSampler":
        """Fit what the sampler learns from the model before drawing; by default nothing.

        Args:
            denoiser: the model that will be sampled.
            cond: conditions of the draws `(n, ...)`, or `None`.
            shape: shape of one example.
            key: typed PRNG key.

        Returns:
            The sampler to draw with.
        """
        return self

    @abc.abstractmethod
    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: PyTree,
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
        skip: how unneeded evaluations are skipped. `"dynamic"`: where no draw of the batch needs one, decided at run
            time, so that nothing recompiles. `"static"`: decided on the host from the grid, compiled once per
            pattern, without a branch. `"compact"`: also within a batch, by gathering the draws that need it.
            `"phases"`: as `"dynamic"`, but rows in which no draw needs more than the plain prediction run in a loop of
            their own, which holds nothing else and has no branch; not differentiable in reverse.
        fuse: evaluate the condition and its absence in one concatenated call instead of one after the other.
        noise: where the noise of stochastic tables comes from, such as `genkit.diffusion.BrownianNoise`; `None` for
            independent normals.
        patterns: which evaluations each row makes that are skipped statically; worked out from the grid if not given.

    Raises:
        ValueError: for an unknown way to skip, or a noise that the table cannot take.
        TypeError: if `table` or `guidance` is of another kind.

    Example:
        >>> import genkit as gk
        >>> sampler = gk.Sampler(gk.diffusion.ddim(gk.diffusion.karras(8, 0.01, 80.0)), skip="static")
        >>> sampler.table.nfe
        8
    """

    table: Table
    guidance: PyTree = None
    skip: str = eqx.field(static=True, default="dynamic", kw_only=True)
    fuse: bool = eqx.field(static=True, default=False, kw_only=True)
    noise: Callable | None = eqx.field(default=None, kw_only=True)
    patterns: Patterns | None = eqx.field(static=True, default=None, kw_only=True, repr=False)
    takes_guidance: ClassVar[bool] = True

    def __check_init__(self) -> None:
        """Refuse foreign objects and unknown ways to skip."""
        if not isinstance(self.table, Table):
            raise TypeError(
                f"`table` must be a `genkit.Table`, such as `gk.diffusion.heun(grid)`; got {describe(self.table)}."
            )
        check_choice("skip", self.skip, SKIPS)
        collect_hooks(self.guidance)
        if isinstance(self.noise, AbstractPart):
            self.noise.check_table(self.table)

    @property
    def block_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of consecutive draws that interact: the particles of a population, else 1."""
        population = collect_hooks(self.guidance).population
        if population is None:
            return 1
        return population.num_particles

    @property
    def levels(self) -> Float[np.ndarray, " calls"] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The noise levels at which the model is asked; `None` where they are traced."""
        return self.table.levels

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: PyTree,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
        trajectory: bool = False,
    ) -> Draws:
        """Draw one example per key; see `AbstractSampler.draw`."""
        check_signature(model)
        hooks = collect_hooks(self.guidance)
        _check_condition(hooks, cond)
        whole = len(keys) % self.block_size == 0
        check(whole, "keys", lambda: f"a multiple of {self.block_size} (the population)", len(keys))
        x_init, _ = start(keys, jnp.asarray(self.table.sigma)[0], x_init, shape)
        guidance = hooks.guidance
        if guidance is None:
            guidance = Unguided()
        patterns = None
        if self.skip == "static":
            patterns = self._patterns(guidance, shape, cond)
        batch = Batch(
            Runner(model, guidance, self.skip, self.fuse),
            hooks,
            jax.random.key_data(keys),
            cond,
            jax.random.key_impl(keys),
        )
        value, tally, info, states = Draw(batch, trajectory, self.noise)(self.table, x_init, patterns)
        return Draws(value, tally.executed, tally.logical, info, at_steps(self.table, states))

    def prepared(self, shape: tuple[int, ...], cond: PyTree) -> "Sampler":
        """This sampler with what must be decided on the host decided: the evaluations that are skipped statically."""
        if self.skip != "static" or self.patterns is not None:
            return self
        guidance = collect_hooks(self.guidance).guidance
        if guidance is None:
            guidance = Unguided()
        patterns = self._patterns(guidance, shape, cond)
        return dataclasses.replace(self, patterns=patterns)

    def _patterns(self, guidance: Guidance, shape: tuple[int, ...], cond: PyTree) -> Patterns:
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

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> states, keys = gk.sampling.start(jax.random.split(jax.random.key(0), 5), 80.0, None, (2,))
        >>> states.shape, keys.shape
        ((5, 2), (5,))
    """
    first = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    rest = jax.vmap(lambda key: jax.random.fold_in(key, LOOP))(keys)
    if x_init is None:
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(first)
        x_init = jnp.asarray(level, noise.dtype) * noise
    return x_init, rest


def as_sampler(sampler: PyTree) -> AbstractSampler:
    """Wrap a bare table in a `Sampler`; samplers pass.

    Args:
        sampler: a `Table` or an `AbstractSampler`.

    Returns:
        A sampler.

    Raises:
        TypeError: for anything else.

    Example:
        >>> import genkit as gk
        >>> type(gk.sampling.as_sampler(gk.diffusion.ddim(gk.diffusion.karras(4, 0.01, 80.0)))).__name__
        'Sampler'
    """
    if isinstance(sampler, Table):
        return Sampler(sampler)
    if isinstance(sampler, AbstractSampler):
        return sampler
    raise TypeError(
        "`sampler` must be a `genkit.Table`, such as `gk.diffusion.heun(grid)`, or a genkit sampler, such as "
        f"`gk.Sampler(table, guidance)`; got {describe(sampler)}."
    )


def _check_condition(hooks: Hooks, cond: PyTree) -> None:
    """Refuse a guidance that compares a condition with its absence where there is none."""
    if hooks.guidance is not None and cond is None and compares_with_absence(hooks.guidance):
        raise ValueError(
            "`cond` must be given with a guidance that compares the condition with its absence; got None. "
            "Pass `cond=`, a scalar or one entry per draw."
        )


def at_steps(table: Table, states: Array | None) -> Array | None:
    """Of the states before each row and at the end, those at the levels of the grid."""
    if states is None or not is_known(table.step):
        return states
    starts = np.flatnonzero(np.diff(np.asarray(table.step), prepend=-1))
    return states[:, np.append(starts, table.num_rows)]
