"""Diffusion and flow matching: schedules, denoisers, objectives, grids, samplers."""

from ._analytic import GaussianDenoiser as GaussianDenoiser, MixtureDenoiser as MixtureDenoiser
from ._analytic_empirical import EmpiricalDenoiser as EmpiricalDenoiser
from ._convert import convert as convert
from ._grids import karras as karras, log_uniform as log_uniform, time_uniform as time_uniform
from ._losses import DenoisingScoreMatching as DenoisingScoreMatching, FlowMatching as FlowMatching
from ._preconditioned import Preconditioned as Preconditioned
from ._schedule_family import (
    EDM as EDM,
    VE as VE,
    VP as VP,
    CondOT as CondOT,
    Cosine as Cosine,
    SubVP as SubVP,
)
from ._schedules import Schedule as Schedule
from ._tables import ancestral as ancestral, ddim as ddim, heun as heun
from ._tables_multistep import dpmpp as dpmpp, unipc as unipc
from ._weights import (
    EDMWeight as EDMWeight,
    EpsWeight as EpsWeight,
    MinSNRWeight as MinSNRWeight,
    VWeight as VWeight,
)
