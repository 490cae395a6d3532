"""Diffusion and flow matching: schedules, denoisers, objectives, grids, samplers."""

from ._analytic import GaussianDenoiser as GaussianDenoiser, MixtureDenoiser as MixtureDenoiser
from ._analytic_empirical import EmpiricalDenoiser as EmpiricalDenoiser
from ._convert import convert as convert
from ._couplings import (
    IndependentCoupling as IndependentCoupling,
    MinibatchOT as MinibatchOT,
    assignment as assignment,
)
from ._exact_error import ExactError as ExactError, exact_error as exact_error
from ._grids import karras as karras, log_uniform as log_uniform, time_uniform as time_uniform
from ._grids_more import beta_quantile as beta_quantile, cosine as cosine, gaussian_optimal as gaussian_optimal
from ._inverse import Measurement as Measurement, colorize as colorize
from ._kinetic import KineticOptimal as KineticOptimal
from ._langevin import (
    BrownianNoise as BrownianNoise,
    PredictorCorrector as PredictorCorrector,
    predictor_corrector as predictor_corrector,
)
from ._law import FlowDistribution as FlowDistribution, FlowMeasure as FlowMeasure
from ._likelihood import (
    AbstractTrace as AbstractTrace,
    ExactTrace as ExactTrace,
    Hutchinson as Hutchinson,
    LogProb as LogProb,
    bits_per_dim as bits_per_dim,
    dequantize as dequantize,
    log_prob as log_prob,
    sample_log_prob as sample_log_prob,
)
from ._losses import DenoisingScoreMatching as DenoisingScoreMatching, FlowMatching as FlowMatching
from ._losses_score import (
    ImplicitScoreMatching as ImplicitScoreMatching,
    LearnedWeighting as LearnedWeighting,
    LikelihoodBound as LikelihoodBound,
    SlicedScoreMatching as SlicedScoreMatching,
    VariationalBound as VariationalBound,
    WithUncertainty as WithUncertainty,
)
from ._posthoc_ema import PowerEMA as PowerEMA, ema_exponent as ema_exponent, posthoc_ema as posthoc_ema
from ._preconditioned import Preconditioned as Preconditioned
from ._probability_flow import (
    ProbabilityFlow as ProbabilityFlow,
    Teleported as Teleported,
    probability_flow as probability_flow,
    teleport as teleport,
)
from ._range import check_levels as check_levels
from ._replace import DDRM as DDRM, Replacement as Replacement, repaint as repaint
from ._schedule_family import (
    EDM as EDM,
    VE as VE,
    VP as VP,
    CondOT as CondOT,
    Cosine as Cosine,
    SubVP as SubVP,
)
from ._schedule_more import (
    Discrete as Discrete,
    Polynomial as Polynomial,
    Shifted as Shifted,
    Tabulated as Tabulated,
    ddpm_betas as ddpm_betas,
    zero_terminal_snr as zero_terminal_snr,
)
from ._schedules import Schedule as Schedule
from ._tables import ancestral as ancestral, ddim as ddim, heun as heun
from ._tables_family import (
    deis as deis,
    dpm_solver as dpm_solver,
    ipndm as ipndm,
    lms as lms,
    rosenbrock as rosenbrock,
    velocity_ab as velocity_ab,
)
from ._tables_multistep import dpmpp as dpmpp, unipc as unipc
from ._tables_stochastic import (
    euler_maruyama as euler_maruyama,
    restart as restart,
    reverse_diffusion as reverse_diffusion,
    sa as sa,
)
from ._weights import (
    EDMWeight as EDMWeight,
    EpsWeight as EpsWeight,
    MinSNRWeight as MinSNRWeight,
    VWeight as VWeight,
)
