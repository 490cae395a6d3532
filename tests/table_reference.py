"""An independent runner of tables in NumPy, and Gaussian data whose every answer is known."""

import numpy as np


EIGENVALUES = np.array([4.0, 1.0, 0.25, 0.01])


def run_table(table, denoise, x, noise=None):
    """Run `table` from `x` with `denoise(x, sigma)`; `noise(row, stream)` returns the standard normals."""
    y = base = np.asarray(x, np.float64)
    history = [np.zeros_like(y) for _ in range(4)]
    for r in range(table.num_rows):
        made = denoise(y, table.sigma[r]) if table.evaluate[r] else np.zeros_like(y)
        history[table.slot[r]] = table.p[r] * y + table.q[r] * made
        base = table.a[r] * base + sum(w * h for w, h in zip(table.b[r], history, strict=True))
        if table.c[r] != 0:
            base = base + table.c[r] * noise(r, 0)
        y = table.d[r] * base + sum(w * h for w, h in zip(table.e[r], history, strict=True))
        if table.c_stage[r] != 0:
            y = y + table.c_stage[r] * noise(r, 1)
    return y


def gaussian(eigenvalues=EIGENVALUES):
    """The denoiser of centered Gaussian data of diagonal covariance."""
    return lambda x, sigma: x * eigenvalues / (eigenvalues + sigma**2)


def flow_map(x, sigma, sigma_next, eigenvalues=EIGENVALUES):
    """The exact probability flow of that data."""
    return x * np.sqrt((eigenvalues + sigma_next**2) / (eigenvalues + sigma**2))


def output_variance(table, sigma_max, eigenvalues=EIGENVALUES):
    """The exact variance of the draws of centered Gaussian data: a sum of squares, no Monte Carlo.

    The draw is linear in the initial state and in each noise: all unit noises are pushed through at once.
    """
    rows = table.num_rows
    start = np.zeros((2 * rows + 1, len(eigenvalues)))
    start[-1] = np.sqrt(eigenvalues + sigma_max**2)
    unit = np.eye(2 * rows, 2 * rows + 1)[:, :, None]
    pushed = run_table(table, gaussian(eigenvalues), start, lambda r, stream: unit[2 * r + stream])
    return np.sum(pushed**2, axis=0)
