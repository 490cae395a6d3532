"""Contract cases of Markov chain Monte Carlo; the chains themselves are run in `test_mcmc.py`."""

from contract import Case

from genkit import mcmc


CASES = [
    Case("NUTS", lambda: mcmc.NUTS(10, 10)),
    Case("HMC", lambda: mcmc.HMC(10, 10, trajectory_length=2.0)),
]
