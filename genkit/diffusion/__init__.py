"""Diffusion and flow matching: schedules, denoisers, objectives, grids, samplers."""

from genkit.diffusion._denoisers._empirical import EmpiricalDenoiser as EmpiricalDenoiser
from genkit.diffusion._denoisers._gaussian import GaussianDenoiser as GaussianDenoiser
from genkit.diffusion._denoisers._measurement import Measurement as Measurement
from genkit.diffusion._denoisers._mixture import MixtureDenoiser as MixtureDenoiser
from genkit.diffusion._denoisers._preconditioned import Preconditioned as Preconditioned
from genkit.diffusion._diagnostics._exact_error import ExactError as ExactError, exact_error as exact_error
from genkit.diffusion._kinetic import KineticOptimal as KineticOptimal
from genkit.diffusion._likelihood._bits import bits_per_dim as bits_per_dim, dequantize as dequantize
from genkit.diffusion._likelihood._log_prob import (
    LogProb as LogProb,
    log_prob as log_prob,
    sample_log_prob as sample_log_prob,
)
from genkit.diffusion._likelihood._measure import (
    FlowDistribution as FlowDistribution,
    FlowMeasure as FlowMeasure,
)
from genkit.diffusion._likelihood._trace import (
    AbstractTrace as AbstractTrace,
    ExactTrace as ExactTrace,
    Hutchinson as Hutchinson,
)
from genkit.diffusion._objectives._bounds import (
    LikelihoodBound as LikelihoodBound,
    VariationalBound as VariationalBound,
)
from genkit.diffusion._objectives._couplings import (
    IndependentCoupling as IndependentCoupling,
    MinibatchOT as MinibatchOT,
)
from genkit.diffusion._objectives._denoising import (
    DenoisingScoreMatching as DenoisingScoreMatching,
    FlowMatching as FlowMatching,
)
from genkit.diffusion._objectives._learned_weighting import (
    LearnedWeighting as LearnedWeighting,
    WithUncertainty as WithUncertainty,
)
from genkit.diffusion._objectives._power_ema import (
    PowerEMA as PowerEMA,
    posthoc_ema as posthoc_ema,
)
from genkit.diffusion._objectives._score_matching import (
    ImplicitScoreMatching as ImplicitScoreMatching,
    SlicedScoreMatching as SlicedScoreMatching,
)
from genkit.diffusion._objectives._weights import (
    EDMWeight as EDMWeight,
    EpsWeight as EpsWeight,
    MinSNRWeight as MinSNRWeight,
    VWeight as VWeight,
)
from genkit.diffusion._samplers._adams import (
    deis as deis,
    ipndm as ipndm,
    lms as lms,
    rosenbrock as rosenbrock,
    velocity_ab as velocity_ab,
)
from genkit.diffusion._samplers._brownian_noise import BrownianNoise as BrownianNoise
from genkit.diffusion._samplers._ddim import ancestral as ancestral, ddim as ddim
from genkit.diffusion._samplers._ddrm import DDRM as DDRM
from genkit.diffusion._samplers._dpm_solver import dpm_solver as dpm_solver, dpmpp as dpmpp
from genkit.diffusion._samplers._heun import heun as heun, restart as restart
from genkit.diffusion._samplers._inpainting import Replacement as Replacement, repaint as repaint
from genkit.diffusion._samplers._predictor_corrector import predictor_corrector as predictor_corrector
from genkit.diffusion._samplers._probability_flow import probability_flow as probability_flow
from genkit.diffusion._samplers._reverse_diffusion import (
    euler_maruyama as euler_maruyama,
    reverse_diffusion as reverse_diffusion,
)
from genkit.diffusion._samplers._sa import sa as sa
from genkit.diffusion._samplers._teleport import Teleported as Teleported, teleport as teleport
from genkit.diffusion._samplers._unipc import unipc as unipc
from genkit.diffusion._schedules._base import Schedule as Schedule
from genkit.diffusion._schedules._convert import convert as convert
from genkit.diffusion._schedules._discrete import (
    Discrete as Discrete,
    ddpm_betas as ddpm_betas,
    zero_terminal_snr as zero_terminal_snr,
)
from genkit.diffusion._schedules._grids import (
    angle_uniform as angle_uniform,
    beta_quantile as beta_quantile,
    gaussian_optimal as gaussian_optimal,
    karras as karras,
    log_uniform as log_uniform,
    time_uniform as time_uniform,
)
from genkit.diffusion._schedules._standard import (
    EDM as EDM,
    VE as VE,
    VP as VP,
    CondOT as CondOT,
    Cosine as Cosine,
    Polynomial as Polynomial,
    Shifted as Shifted,
    SubVP as SubVP,
)
from genkit.diffusion._schedules._tabulated import Tabulated as Tabulated
