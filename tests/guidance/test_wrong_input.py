"""Labels, networks and conditions that do not fit: refused before anything is drawn, by name."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from guidance.tools import gd, gg, mixture

import genkit as gk


class Labeled(eqx.Module):
    """A model of a number of classes, keeping the first few entries of its prediction."""

    num_labels: int = eqx.field(static=True)
    keep: int = eqx.field(static=True, default=3)

    def __call__(self, x, sigma, cond=None):
        return (x / (1 + sigma**2))[: self.keep]


@pytest.mark.parametrize(
    ("guidance", "says"),
    [
        (lambda: gg.negative(2.0, 4), "`cond` must be used with labels from 0 to 3, or -1 for none; got 4"),
        (lambda: gg.perpneg(2.0, -2), "`cond`.*got -2"),
        (lambda: gg.compose({0: 1.0, 7: 0.5}), "`cond`.*got 7"),
        (lambda: gg.fkc({"given": 2.0, 9: -1.0}, 2), "`cond`.*got 9"),
        (lambda: gg.interval(gg.cfg(2.0) + gg.negative(2.0, 4), 0.1, 1.0) >> gg.NormCap(), "`cond`.*got 4"),
        (lambda: gg.autoguide(Labeled(2), 2.0), "`weak` must be used with labels from 0 to 1, or -1 for none; got 2"),
        (lambda: gg.cfg(2.0) + gg.autoguide(Labeled(2), 2.0), "`weak`.*0 to 1.*got 2"),
        (lambda: (gg.cfg(2.0), gg.reflect(Labeled(2))), "`weak`.*0 to 1.*got 2"),
        (lambda: gg.autoguide(Labeled(4, keep=2), 2.0), r"`weak`.*keeps the shape \(3,\); got \(2,\)"),
        (lambda: gg.cfg(2.0) + gg.perturbed(Labeled(4, keep=1), 2.0), r"`perturbed`.*\(3,\); got \(1,\)"),
        (lambda: gg.gfcg(lambda x0: x0, 3.0, weak=Labeled(4, keep=1)), r"`weak`.*\(3,\); got \(1,\)"),
        (lambda: gg.gfcg(lambda x0: x0[:2], 3.0), "`cond` must be labels that the classifier.*0 to 1; got 2"),
        (lambda: gg.reflect(Labeled(4, keep=2)), r"keeps the shape \(3,\); got \(2,\)"),
    ],
)
def test_labels_and_networks_that_do_not_fit(guidance, says):
    table = gd.ancestral(gd.karras(3, 0.1, 2.0))
    with pytest.raises(ValueError, match=says):
        gk.sample(table, mixture(), 4, cond=2, guidance=guidance(), key=jax.random.key(0))


@pytest.mark.parametrize(
    "guidance",
    [
        lambda: gg.cfg(2.0),
        lambda: gg.apg(2.0),
        lambda: gg.perpneg(2.0, 1),
        lambda: gg.adaptive(gg.interval(gg.cfg(2.0), 0.1, 1.0)),
        lambda: gg.rescale(gg.negative(2.0, 1) + gg.cfg(2.0), 0.5),
        lambda: gg.gfcg(lambda x0: x0, 2.0),
        lambda: gg.classifier(lambda x, sigma, cond: 0.0 * x[0], 1.0),
    ],
)
def test_a_missing_condition(guidance):
    with pytest.raises(ValueError, match="`cond` must be"):
        gk.sample(gd.ddim(gd.karras(3, 0.1, 2.0)), mixture(), 4, guidance=guidance(), key=jax.random.key(0))


def test_a_classifier_of_fewer_classes_spares_what_it_does_not_know():
    # Without a shape there is nothing to check beforehand: the reports say so, and the others are guided.
    law = mixture()
    bare = lambda x, sigma, cond=None: law(x, sigma, cond)
    draw = lambda guidance: gk.sample(
        gd.ddim(gd.karras(3, 0.1, 2.0)),
        bare,
        4,
        shape=(3,),
        cond=[0, 1, 2, 3],
        guidance=guidance,
        key=jax.random.key(0),
    )
    draws = draw(gg.gfcg(lambda x0: x0[:2], 3.0))
    assert draws.info["classifier_failed"].all(axis=1).tolist() == [False, False, True, True]
    assert jnp.allclose(draws.value[2:], draw(None).value[2:]) and not jnp.allclose(draws.value, draw(None).value)


def test_scales_that_are_no_numbers():
    with pytest.raises(TypeError, match="`scale` must be a number"):
        gg.cfg(["high"])


def test_adaptive_solvers_say_why_they_refuse_what_remembers():
    flow = gd.probability_flow(0.1, 2.0)
    for stateful in (gg.apg(2.0, momentum=-0.5), gg.adaptive(gg.cfg(2.0))):
        with pytest.raises(ValueError, match="rejected steps"):
            gk.sample(flow, mixture(), 4, cond=1, guidance=stateful, key=jax.random.key(0))
