"""Every wrong input has its own clear error."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from vi_golden import g1_guide, g1_model

from genkit import NonFiniteError, Problem, infer, vi


def new_key():
    return jax.random.key(0)


def run(fn, **options):
    return vi.E(fn, **options)(key=new_key())


def test_duplicate_addresses():
    def twice():
        return vi.sample("x", dist.Normal(0.0, 1.0)) + vi.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'x' twice"):
        run(twice)
    with pytest.raises(ValueError, match="'x' twice"):
        vi.program(twice)().sample(key=new_key())


def test_sites_must_match():
    def short(t):
        vi.sample("a", dist.Bernoulli(logits=t[0]))

    def long(t):
        g1_guide()(t)
        vi.sample("c", dist.Bernoulli(0.5))

    t = jnp.zeros(3)
    with pytest.raises(ValueError, match="no 'b'"):
        run(lambda: vi.elbo(vi.program(g1_model)(), vi.program(short)(t)))
    with pytest.raises(ValueError, match="'c' as well"):
        run(lambda: vi.elbo(vi.program(g1_model)(), vi.program(long)(t)))


def test_supports_must_match():
    def model():
        numpyro.sample("x", dist.Gamma(2.0, 1.0))

    for law in (dist.Normal(0.0, 1.0), dist.Poisson(1.0)):
        with pytest.raises(ValueError, match="support at site 'x'"):
            run(lambda law=law: vi.elbo(vi.program(model)(), vi.program(lambda: vi.sample("x", law))()))


@pytest.mark.parametrize(
    ("law", "grad"),
    [
        (dist.Normal(0.0, 1.0), vi.Enum()),
        (dist.Bernoulli(0.5), vi.Reparam()),
        (dist.Poisson(1.0), vi.LocalExpectation()),
        (dist.Categorical(jnp.ones(3) / 3), vi.DisARM()),
        (dist.Beta(1.0, 1.0), vi.MVD()),
        (dist.Poisson(1.0), vi.Implicit()),
    ],
)
def test_strategy_that_cannot_serve(law, grad):
    with pytest.raises(ValueError, match=f"suit the distribution.*{type(grad).__name__}"):
        run(lambda: jnp.sum(vi.sample("x", law, grad=grad)) * 1.0)


def test_enumeration_cap_names_the_ways_out():
    law = dist.Bernoulli(0.5).expand([20])
    with pytest.raises(ValueError, match=r"1048576.*LocalExpectation.*inner `E`.*RLOO"):
        run(lambda: jnp.sum(vi.sample("x", law, grad=vi.Enum())) * 1.0)


def test_observed_sites_take_no_strategy():
    with pytest.raises(ValueError, match="observed"):
        vi.sample("x", dist.Normal(0.0, 1.0), obs=1.0, grad=vi.Reparam())

    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=1.0, infer={"grad": vi.Score()})

    with pytest.raises(ValueError, match="observed"):
        vi.program(model)().log_density({})


def test_names_from_outside_must_be_there():
    t = jnp.zeros(3)
    with pytest.raises(ValueError, match=r"'typo' \(its sites: a, b\)"):
        vi.with_grad(vi.program(g1_guide())(t), {"typo": vi.Score()}).sample(key=new_key())
    with pytest.raises(ValueError, match=r"observed site; got Score at 'y'"):
        vi.with_grad(vi.program(g1_model)(), {"y": vi.Score()}).sample(key=new_key())
    with pytest.raises(ValueError, match=r"'typo' \(its sites: a, b, y\)"):
        vi.condition(vi.program(g1_model)(), {"typo": 1.0}).log_density({"a": 1, "b": 0})
    with pytest.raises(ValueError, match="'y', which it observes itself"):
        vi.condition(vi.program(g1_model)(), {"y": 1.0}).log_density({"a": 1, "b": 0})


def test_raw_transformations_are_refused():
    def site(x):
        return vi.sample("x", dist.Normal(x, 1.0))

    def scanned():
        return jax.lax.scan(lambda c, _: (c + site(0.0), None), 0.0, None, length=3)[0]

    for fn in (
        scanned,
        lambda: jnp.sum(jax.vmap(site)(jnp.arange(3.0))),
        lambda: jax.grad(site)(0.0),
        lambda: jax.lax.cond(True, site, site, 0.0),
        lambda: jax.checkpoint(site)(0.0),
        lambda: jax.jit(site)(0.0),
        lambda: jnp.sum(jax.vmap(lambda x: vi.draw(dist.Normal(x, 1.0))[0])(jnp.arange(3.0))),
    ):
        with pytest.raises(RuntimeError, match=r"gk\.vi\.scan"):
            run(fn)
    with pytest.raises(RuntimeError, match=r"gk\.vi\.scan"):
        vi.program(scanned)().sample(key=new_key())


def test_nan_densities_name_their_site():
    def model():
        numpyro.factor("bad", jnp.nan)

    with pytest.raises(NonFiniteError, match="'bad'"):
        vi.program(model)().log_density({})


@pytest.mark.slow
@pytest.mark.key_reuse  # numpyro's own initialization uses keys twice
def test_fits_that_leave_the_finite_numbers_name_the_site():
    def fine():
        return numpyro.sample("x", dist.Normal(0.0, 1.0))

    def model():
        numpyro.factor("bad", jnp.log(-1.0 - fine() ** 2))

    for guide in ("mean_field", vi.mean_field(fine)):  # found at the start, and after training has failed
        with pytest.raises(NonFiniteError, match="'bad'"):
            infer(Problem(model), vi.Fit(guide, num_steps=5, num_samples=5), key=new_key())


@pytest.mark.key_reuse  # numpyro's own initialization uses keys twice
def test_guides_to_fit_have_parameters():
    with pytest.raises(ValueError, match="`guide` must be .* with at least one floating array"):
        infer(Problem(g1_model), vi.Fit(g1_guide(), num_steps=2), key=new_key())


def test_keys_and_places():
    with pytest.raises(TypeError, match="key"):
        vi.E(lambda: 1.0)()
    with pytest.raises(RuntimeError, match="inside"):
        vi.sample("x", dist.Normal(0.0, 1.0))
    with pytest.raises(RuntimeError, match=r"gk\.vi\.E"):
        vi.elbo(vi.program(g1_model)(), vi.program(g1_guide())(jnp.zeros(3)))
    with pytest.raises(ValueError, match="scalar"):
        run(lambda: jnp.ones(2))
    with pytest.raises(ValueError, match="continuous"):
        vi.exact(lambda: vi.sample("x", dist.Normal(0.0, 1.0)))()
    with pytest.raises(TypeError, match="Strategy"):
        vi.with_grad(vi.program(g1_model), {"a": "enum"})  # pyright: ignore[reportArgumentType]


def test_subsampled_bounds_need_their_plate():
    def model(y):
        with numpyro.plate("n", 4, subsample_size=2) as index:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    def guide():
        with numpyro.plate("n", 4, subsample_size=2):
            vi.sample("z", dist.Normal(0.0, 1.0))

    p, q = vi.program(model)(jnp.arange(4.0)), vi.program(guide)()
    with pytest.raises(ValueError, match="plate"):
        run(lambda: vi.iwelbo(p, q, 2))
    assert jnp.isfinite(run(lambda: vi.iwelbo(p, q, 2, plate="n")))
    assert jnp.isfinite(run(lambda: vi.elbo(p, q)))
