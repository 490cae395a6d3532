"""Inputs that people really have: integers, half precision, empty batches, NaN."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk


NORMAL = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
SHIFTED = gk.diffusion.GaussianDenoiser(jnp.ones(2), 1.0)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
def test_numbers_are_not_cast_to_the_dtype_of_the_data(dtype):
    x = np.array([[1, 4], [3, 0], [2, 2], [9, 5]]).astype(dtype)
    few_steps = gk.distill.FewStep(NORMAL, [2.0, 0.5])
    model = gk.distill.ConsistencyModel(lambda x, t, cond: 0.3 * x, 0.5, 0.5)
    objective = gk.distill.ConsistencyObjective(np.array([2.0, 1.0, 0.5]), "l2")
    network = gk.distill.Discriminator((2,), width=4, depth=1, features=NORMAL, key=jr.key(0))
    calls = {
        "one step": lambda x: gk.distill.OneStep(NORMAL, 0.5)(x[0]),
        "few steps": lambda x: few_steps(x[:2]),
        "rollout": lambda x: few_steps.rollout(x[:2], None, jnp.asarray(1)),
        "consistency": lambda x: objective(gk.distill.Pair(model), (x, None), key=jr.key(0))[0],
        "discriminator": lambda x: network(x[0], 0.5),
        "ratio": lambda x: gk.distill.ScoreRatio(20.0).log_ratio(NORMAL, SHIFTED, x[0], 0.5),
        "fdpg": lambda x: gk.distill.fdpg(x[:, 0], 0.5 * np.arange(4), divergence=gk.divergence.JensenShannon()),
        "coverage": lambda x: gk.distill.mode_coverage(x, x[:2], radius=1.5)["precision"],
        "scores": lambda x: gk.distill.divergence_from_scores(
            NORMAL, SHIFTED, x, sigma_min=0.01, sigma_max=50.0, key=jr.key(0)
        ),
    }
    for name, call in calls.items():
        np.testing.assert_allclose(call(x), call(np.float32(x)), rtol=1e-5, err_msg=name)
