"""LinearAG: the second prediction as a linear function of past ones."""

import hashlib
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from genkit._core._checks import check, describe, is_concrete
from genkit.guidance._gates import harmless
from genkit.sampling import Context, Guidance, Prediction, Slot, Table


class LinearFit(eqx.Module):
    """Coefficients of LinearAG and what they were fitted to; made by `fit_linear_ag`.

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
        steps = np.asarray(self.table.step)[np.asarray(self.table.evaluate)]
        marks = np.flatnonzero(np.asarray(self.true))
        return int(len(steps) + np.isin(steps, marks).sum())


class LinearAG(Guidance):
    """A guidance of two predictions, of which the second is mostly computed from past ones."""

    guidance: Guidance
    coefficients: Float[Array, " stop 2 terms"]
    true: Bool[Array, " stop 2"]
    stop: Int[Array, ""]
    fit: LinearFit | None
    record: bool = eqx.field(static=True, default=False)
    needs_grid: bool = eqx.field(static=True, default=True, init=False)

    def slots(self) -> tuple[Slot, ...]:
        """Those of the guidance."""
        return self.guidance.slots()

    def init(self, x: Float[Array, " *shape"]) -> Any:
        """An empty history of both noise predictions."""
        history = jnp.zeros((len(self.true), *x.shape), x.dtype)
        return {"inner": self.guidance.init(x), "first": history, "second": history}

    def needs(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """Both in true steps, the plain one otherwise."""
        plain, other = (slot.name for slot in self.slots())
        here = jnp.minimum(ctx.step, len(self.true) - 1), ctx.corrector.astype(jnp.int32)
        return {plain: True, other: self.record or (ctx.step < self.stop) & self.true[here]}

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """Predict what was not evaluated, and combine."""
        plain, other = (slot.name for slot in self.slots())
        first, second = preds[plain], preds[other]
        here = jnp.minimum(ctx.step, len(self.true) - 1)
        guided, size = ctx.step < self.stop, len(self.true)
        noise = (ctx.x - first.x0) / ctx.sigma
        kind = ctx.corrector.astype(jnp.int32)
        weights = self.coefficients[here, kind].astype(noise.dtype)
        mix = lambda w, history: jnp.tensordot(w, history, 1, precision="highest")
        guess = mix(weights[:size], carry["first"]) + mix(weights[size:-1], carry["second"]) + weights[-1] * noise
        truth = (ctx.x - second.x0) / ctx.sigma
        used = jnp.where(self.true[here, kind] & second.present, truth, guess)
        filled = {plain: first, other: Prediction(ctx.x - ctx.sigma * used, jnp.asarray(True))}
        x0, inner, aux = self.guidance.combine(harmless(filled, first, guided), ctx, carry["inner"])
        keep = lambda old, new: jnp.where(guided, new, old)
        new = {
            "inner": jax.tree.map(keep, carry["inner"], inner),
            "first": keep(carry["first"], carry["first"].at[here].set(noise)),
            "second": keep(carry["second"], carry["second"].at[here].set(used)),
        }
        report = {"linear_first": noise, "linear_used": used, "linear_true": truth} if self.record else {}
        return jnp.where(guided, x0, first.x0), new, aux | report

    def check_draw(self, table: Any, model: Any, cond: Any) -> None:
        """Refuse another grid, table, scale or model than the fitted ones."""
        fit = self.fit
        if fit is None:
            return
        wrong = []
        if _differ(fit.table.sigma, table.sigma):
            wrong.append("the grid")
        elif any(_differ(a, b) for a, b in zip(jax.tree.leaves(fit.table), jax.tree.leaves(table), strict=True)):
            wrong.append("the table")
        for name, before, now in (("scale", fit.scale, digest(self.guidance)), ("model", fit.model, digest(model))):
            if before is not None and now is not None and before != now:
                wrong.append(f"the {name}")
        hint = "Fit again with `gk.guidance.fit_linear_ag`: the coefficients belong to one table, scale and model."
        check(
            not wrong,
            "guidance",
            "fitted to this draw",
            f"coefficients for another draw: {', '.join(wrong)} differs",
            hint,
        )


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
        TypeError: if `fit` is none.

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
    return LinearAG(fit.guidance, fit.coefficients, jnp.stack([fit.true] * 2, axis=1), fit.stop, fit)


def digest(tree: Any) -> str | None:
    """A digest of the arrays of a tree and of where they sit; `None` if one is traced."""
    code = hashlib.sha256(type(tree).__qualname__.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        code.update(jax.tree_util.keystr(path).encode())
        if not hasattr(leaf, "dtype"):
            code.update(getattr(leaf, "__qualname__", type(leaf).__qualname__).encode())
        elif not is_concrete(leaf):
            return None
        else:
            array = np.asarray(leaf)
            code.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return code.hexdigest()


def _differ(a: Any, b: Any) -> bool:
    """Whether two columns differ beyond rounding; traced ones do not."""
    if not (is_concrete(a) and is_concrete(b)):
        return False
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape != b.shape or not np.allclose(a, b, rtol=1e-6, atol=1e-9)
