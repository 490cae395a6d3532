"""A Gaussian student, the two mixtures, and the tables of exact optima."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import genkit as gk


class Gaussian(eqx.Module):
    """x = mean + std z, a law known in closed form."""

    mean: jax.Array
    log_std: jax.Array

    def __call__(self, z, cond=None):
        return self.mean + jnp.exp(self.log_std) * z

    def denoiser(self):
        return gk.diffusion.GaussianDenoiser(self.mean, jnp.exp(2 * self.log_std))


def student(mean, std):
    return Gaussian(jnp.atleast_1d(jnp.asarray(mean, float)), jnp.log(jnp.atleast_1d(jnp.asarray(std, float))))


def mixture(name, **options):
    weights, means, stds = {
        "A": ([0.6, 0.4], [-2.0, 2.0], [0.6, 0.8]),
        "B": ([0.7, 0.3], [-1.0, 1.5], [0.7, 0.9]),
    }[name]
    means = jnp.asarray(means)[:, None]
    return gk.diffusion.MixtureDenoiser(jnp.asarray(weights), means, jnp.asarray(stds)[:, None] ** 2, **options)


d = gk.divergence
FAMILY = {
    "Neyman": d.NeymanChi2,
    "softened reverse KL": d.SoftenedReverseKL,
    "total variation": d.TotalVariation,
    "reverse KL": d.ReverseKL,
    "alpha 0.25": lambda: d.Alpha(0.25),
    "Jeffreys": d.Jeffreys,
    "Hellinger": d.SquaredHellinger,
    "Jensen-Shannon": d.JensenShannon,
    "alpha 0.75": lambda: d.Alpha(0.75),
    "Le Cam": d.LeCam,
    "forward KL": d.ForwardKL,
    "softened forward KL": d.SoftenedForwardKL,
    "Pearson": d.PearsonChi2,
}

# Optima (mean, std) by quadrature, in the order of FAMILY. Diffused: the mean over noise levels 1/4, 1/2, 1 and 2.
B_CLEAN = np.array(
    [(-0.7898, 0.8461), (-0.6616, 0.9518), (-0.751, 0.992), (-0.2313, 1.2469), (-0.2158, 1.2983), (-0.2056, 1.3034),
     (-0.2230, 1.3324), (-0.2358, 1.3487), (-0.2360, 1.3578), (-0.2538, 1.3684), (-0.2500, 1.3779), (-0.2812, 1.4122),
     (-0.2959, 1.4283)]
)  # fmt: skip
B_DIFFUSED = np.array(
    [(-0.4984, 1.0087), (-0.2776, 1.2143), (-0.396, 1.365), (-0.2323, 1.2785), (-0.2304, 1.3140), (-0.2251, 1.3215),
     (-0.2351, 1.3405), (-0.2422, 1.3516), (-0.2422, 1.3611), (-0.2525, 1.3656), (-0.2500, 1.3779), (-0.2688, 1.4069),
     (-0.2789, 1.4224)]
)  # fmt: skip
A_CLEAN = np.array(
    [(-1.9947, 0.6069), (-1.9936, 0.6086), (-1.777, 0.966), (-1.9904, 0.6137), (-1.9863, 0.6209), (-0.0855, 1.8729),
     (-0.2365, 2.0208), (-0.2847, 2.0660), (-0.3345, 2.0561), (-0.3174, 2.0980), (-0.4000, 2.0765), (-0.4771, 2.1017),
     (-0.5208, 2.1054)]
)  # fmt: skip
A_DIFFUSED = np.array(
    [(-1.9362, 0.6462), (-1.9140, 0.6674), (-0.414, 2.211), (-0.1362, 1.8630), (-0.2512, 1.9566), (-0.2439, 1.9061),
     (-0.3193, 2.0131), (-0.3464, 2.0505), (-0.3657, 2.0504), (-0.3703, 2.0840), (-0.4000, 2.0765), (-0.4500, 2.1163),
     (-0.4805, 2.1286)]
)  # fmt: skip
TABLES = {
    ("A", "clean"): A_CLEAN,
    ("A", "diffused"): A_DIFFUSED,
    ("B", "clean"): B_CLEAN,
    ("B", "diffused"): B_DIFFUSED,
}
BINOMIAL = np.array(
    [0.2082, 0.2104, 0.2333, 0.2165, 0.2243, 0.3637, 0.2480, 0.2277, 0.3462, 0.2201, 0.4200, 0.4343, 0.4589]
)
