"""LinearAG: the second prediction as a linear function of past ones."""

import hashlib
from collections.abc import Callable, Mapping
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from genkit._core._checks import describe, fail
from genkit._core._known import is_known
from genkit.guidance._switch import combine_where_on, select
from genkit.guidance._types import Combined, Needs
from genkit.guidance._unguided import evaluations_per_step
from genkit.sampling import Context, Guidance, Prediction, Slot, Table


class LinearFit(eqx.Module):
    """Coefficients of LinearAG, with the table, model and guidance they belong to; made by `fit_linear_ag`.

    Args:
        guidance: the guidance whose second prediction is replaced.
        coefficients: weights of past and present noise predictions `(stop, 2, 2 stop + 1)`: for each step, for its
            first evaluation and for its corrector, those of the past conditional ones, of the past others, and of the
            present conditional one.
        true: steps in which both predictions are made `(stop,)`.
        stop: step from which on the plain prediction is used.
        error: relative error of the fitted predictions `(stop, 2)`; zero where none was fitted.
        table: the sampler.
        model: a digest of the model.
        scale: a digest of the guidance.
    """

    guidance: Guidance
    coefficients: Float[Array, " stop 2 terms"]
    true: Bool[Array, " stop"]
    stop: Int[Array, ""]
    error: Float[Array, " stop 2"]
    table: Table
    model: str | None = eqx.field(static=True)
    scale: str | None = eqx.field(static=True)

    @property
    def num_evaluations(self) -> int:
        """Evaluations per draw: two in true steps, one in the others."""
        plain = evaluations_per_step(self.table)
        # A true step makes the second prediction at each of its evaluations, its corrector included.
        return int(plain.sum() + plain[np.flatnonzero(np.asarray(self.true))].sum())


class LinearAG(Guidance):
    """A guidance of two predictions, of which the second is mostly computed from past ones."""

    guidance: Guidance
    coefficients: Float[Array, " stop 2 terms"]
    true: Bool[Array, " stop 2"]
    stop: Int[Array, ""]
    fit: LinearFit | None
    record: bool = eqx.field(static=True, default=False)
    needs_grid: ClassVar[bool] = True

    def slots(self) -> tuple[Slot, ...]:
        return self.guidance.slots()

    def init(self, x: Float[Array, " *shape"]) -> PyTree[Array]:
        # Noise predictions of the past steps; those to come are zero, and so are their coefficients.
        history = jnp.zeros((len(self.true), *x.shape), x.dtype)
        return {"inner": self.guidance.init(x), "first": history, "second": history}

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        plain, other = (slot.name for slot in self.slots())
        step, kind = self._place(ctx)
        return {plain: True, other: self.record or (ctx.step < self.stop) & self.true[step, kind]}

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        plain, other = (slot.name for slot in self.slots())
        first = preds[plain]
        second = preds[other]
        step, kind = self._place(ctx)
        noise = (ctx.x - first.x0) / ctx.sigma
        truth = (ctx.x - second.x0) / ctx.sigma
        guess = self._guess(noise, carry, step, kind)
        used = jnp.where(self.true[step, kind] & second.present, truth, guess)
        filled = {plain: first, other: Prediction(ctx.x - ctx.sigma * used, jnp.asarray(True))}
        guided = ctx.step < self.stop
        x0, inner, reports = combine_where_on(guided, self.guidance, filled, ctx, carry["inner"])
        new = {
            "inner": inner,
            "first": select(guided, carry["first"].at[step].set(noise), carry["first"]),
            "second": select(guided, carry["second"].at[step].set(used), carry["second"]),
        }
        if self.record:
            reports |= {"linear_first": noise, "linear_used": used, "linear_true": truth}
        return x0, new, reports

    def _place(self, ctx: Context) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The step, and 0 for its first evaluation or 1 for its corrector, as indices of the tables."""
        # From `stop` on there are no rows: the last one stands in, and its result is not used.
        return jnp.minimum(ctx.step, len(self.true) - 1), ctx.corrector.astype(jnp.int32)

    def _guess(
        self, noise: Float[Array, " *shape"], carry: PyTree, step: Int[Array, ""], kind: Int[Array, ""]
    ) -> Float[Array, " *shape"]:
        """The second noise prediction from past ones of both kinds and from the present first one."""
        size = len(self.true)
        weights = self.coefficients[step, kind].astype(noise.dtype)
        # In full precision: the coefficients of nearly collinear predictions are large and cancel, and accelerators
        # multiply matrices with fewer digits by default.
        first = jnp.tensordot(weights[:size], carry["first"], 1, precision="highest")
        second = jnp.tensordot(weights[size:-1], carry["second"], 1, precision="highest")
        return first + second + weights[-1] * noise

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        if self.fit is None:
            return
        wrong = self._differences(self.fit, table, model)
        if wrong:
            fail(
                "guidance",
                "fitted to this draw",
                f"coefficients for another draw: {', '.join(wrong)} differs",
                "Fit again with `gk.guidance.fit_linear_ag`: the coefficients belong to one table, scale and model.",
            )

    def _differences(self, fit: LinearFit, table: Table, model: Callable) -> list[str]:
        """Names of the things in which a draw differs from those that the coefficients were fitted to."""
        wrong = []
        columns = zip(jax.tree.leaves(fit.table), jax.tree.leaves(table), strict=True)
        if _differ(fit.table.sigma, table.sigma):
            wrong.append("the grid")
        elif any(_differ(fitted, given) for fitted, given in columns):
            wrong.append("the table")
        if _digests_differ(fit.scale, digest(self.guidance)):
            wrong.append("the scale")
        if _digests_differ(fit.model, digest(model)):
            wrong.append("the model")
        return wrong


def linear_ag(fit: LinearFit) -> LinearAG:
    r"""LinearAG: guidance whose second noise prediction is mostly a linear function of past ones.

    $$\hat\varepsilon_{uncond}(t) = \sum_{i \le t} b_{ti}\, \varepsilon_{cond}(i) + \sum_{i < t} b'_{ti}\, \hat\varepsilon_{uncond}(i),$$

    with scalar coefficients fitted by `fit_linear_ag`. Steps marked true make both predictions; from `fit.stop` on
    there is the conditional one alone.

    Args:
        fit: the coefficients, and the table, scale and model they were fitted to.

    Returns:
        A guidance that carries a history of both noise predictions. `genkit.sample` refuses it, with a message that
        names the difference, for another grid, table, scale or model.

    Raises:
        TypeError: if `fit` is no such fit.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> law = gk.diffusion.MixtureDenoiser(
        ...     jnp.ones(2), jnp.array([[-1.0], [1.0]]), jnp.array(0.01), labels=jnp.array([0, 1])
        ... )
        >>> table = gk.diffusion.ddim(gk.diffusion.karras(8, 0.01, 10.0))
        >>> fit = gk.guidance.fit_linear_ag(
        ...     table, law, gk.guidance.cfg(3.0), 16, cond=1, true_steps=[0, 2], stop=4, key=jax.random.key(0)
        ... )
        >>> draws = gk.sample(table, law, 4, cond=1, guidance=gk.guidance.linear_ag(fit), key=jax.random.key(1))
        >>> draws.nfe.tolist()
        [10, 10, 10, 10]

    Source: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
    section 5; coefficients by ridge regression on roll-outs are ours.
    """  # noqa: E501
    if not isinstance(fit, LinearFit):
        raise TypeError(f"`fit` must come from `gk.guidance.fit_linear_ag`; got {describe(fit)}.")
    # A true step is true at both of its evaluations.
    true = jnp.stack([fit.true, fit.true], axis=1)
    return LinearAG(fit.guidance, fit.coefficients, true, fit.stop, fit)


def digest(tree: PyTree) -> str | None:
    """A digest of the arrays of a tree and of where they sit; `None` if one is traced."""
    code = hashlib.sha256(type(tree).__qualname__.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        code.update(jax.tree_util.keystr(path).encode())
        if not is_known(leaf):
            return None
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            array = np.asarray(leaf)
            code.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            # The user's own object, often a function, which is known by its name; anything else by its class.
            code.update(getattr(leaf, "__qualname__", type(leaf).__qualname__).encode())
    return code.hexdigest()


def _digests_differ(before: str | None, now: str | None) -> bool:
    # `None` is a digest of something traced, which cannot be compared.
    return before is not None and now is not None and before != now


def _differ(first: Shaped[ArrayLike, "..."], second: Shaped[ArrayLike, "..."]) -> bool:
    """True if two columns differ beyond rounding; traced ones do not."""
    if not is_known(first, second):
        return False
    first = np.asarray(first, np.float64)
    second = np.asarray(second, np.float64)
    # A table that went through float32 is still the same table.
    return first.shape != second.shape or not np.allclose(first, second, rtol=1e-6, atol=1e-9)
