"""Inference: problems, measures, posteriors, and the verb `gk.infer`."""

from genkit._core._resampling import (
    conditional_resample as conditional_resample,
    effective_sample_size as effective_sample_size,
    systematic_resample as systematic_resample,
)
from genkit.inference._draws import (
    mask_of as mask_of,
    trace_at as trace_at,
    unmasked as unmasked,
)
from genkit.inference._infer import (
    Method as Method,
    PreparingMethod as PreparingMethod,
    infer as infer,
)
from genkit.inference._measure import (
    DistributionMeasure as DistributionMeasure,
    Measure as Measure,
    as_measure as as_measure,
)
from genkit.inference._missing import impute as impute
from genkit.inference._posterior import Posterior as Posterior
from genkit.inference._problem import (
    Problem as Problem,
    discrete_sites as discrete_sites,
    improper_start as improper_start,
)
from genkit.inference._traced import (
    ConstantProblem as ConstantProblem,
    TracedProblem as TracedProblem,
    as_compiled_argument as as_compiled_argument,
)
