"""Programmable variational inference: objectives are programs, gradients are unbiased."""

from ._branch import cond as cond
from ._bridges import (
    NumpyroGuide as NumpyroGuide,
    NumpyroObjective as NumpyroObjective,
    from_numpyro as from_numpyro,
    to_numpyro as to_numpyro,
)
from ._control import scan as scan, vmap as vmap
from ._expectation import E as E, exact as exact
from ._fit import Fit as Fit, Plateau as Plateau
from ._guides import (
    Guide as Guide,
    flow_guide as flow_guide,
    full_rank as full_rank,
    low_rank as low_rank,
    mean_field as mean_field,
)
from ._maximize import ProgramObjective as ProgramObjective, maximize as maximize, minimize as minimize
from ._multishot import RLOO as RLOO, DisARM as DisARM, Enum as Enum, Lanes as Lanes
from ._mvd import MVD as MVD
from ._nested import flow as flow, marginal as marginal, normalize as normalize
from ._neutra import neutra as neutra
from ._objectives import cubo as cubo, elbo as elbo, iwelbo as iwelbo, renyi as renyi
from ._population import SIR as SIR, SMC as SMC
from ._program import (
    Program as Program,
    condition as condition,
    draw as draw,
    log_density as log_density,
    program as program,
    sample as sample,
    with_grad as with_grad,
)
from ._report import (
    VarianceReport as VarianceReport,
    VarianceRow as VarianceRow,
    debug as debug,
    explain as explain,
    variance_report as variance_report,
)
from ._strategies import (
    AbstractLocalStrategy as AbstractLocalStrategy,
    Detach as Detach,
    Implicit as Implicit,
    Importance as Importance,
    Learned as Learned,
    Moving as Moving,
    Relaxed as Relaxed,
    Reparam as Reparam,
    Score as Score,
    Strategy as Strategy,
)
from ._wake import (
    f_divergence as f_divergence,
    forward_kl as forward_kl,
    sleep as sleep,
    wake_p as wake_p,
    wake_q as wake_q,
)
