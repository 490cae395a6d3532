"""Programmable variational inference: objectives are programs, gradients are unbiased."""

from genkit.inference import impute as impute
from genkit.vi._discrete._marginalize import infer_discrete as infer_discrete, marginalize as marginalize
from genkit.vi._fit import Fit as Fit, Plateau as Plateau
from genkit.vi._guides._automatic import (
    Guide as Guide,
    flow_guide as flow_guide,
    full_rank as full_rank,
    low_rank as low_rank,
    mean_field as mean_field,
)
from genkit.vi._guides._bases import AbstractBase as AbstractBase
from genkit.vi._guides._layout import Layout as Layout
from genkit.vi._guides._neutra import neutra as neutra
from genkit.vi._guides._numpyro import (
    NumpyroGuide as NumpyroGuide,
    NumpyroObjective as NumpyroObjective,
    from_numpyro as from_numpyro,
    to_numpyro as to_numpyro,
)
from genkit.vi._measures._nested import flow as flow, marginal as marginal, normalize as normalize
from genkit.vi._measures._population import SIR as SIR, SMC as SMC
from genkit.vi._objectives._bounds import cubo as cubo, elbo as elbo, iwelbo as iwelbo, renyi as renyi
from genkit.vi._objectives._maximize import (
    ProgramObjective as ProgramObjective,
    maximize as maximize,
    minimize as minimize,
)
from genkit.vi._objectives._wake import (
    f_divergence as f_divergence,
    forward_kl as forward_kl,
    sleep as sleep,
    wake_p as wake_p,
    wake_q as wake_q,
)
from genkit.vi._programs._branches import cond as cond
from genkit.vi._programs._expectation import E as E, exact as exact
from genkit.vi._programs._loops import scan as scan, vmap as vmap
from genkit.vi._programs._program import (
    Program as Program,
    condition as condition,
    draw as draw,
    log_density as log_density,
    program as program,
    sample as sample,
    with_grad as with_grad,
)
from genkit.vi._report import (
    VarianceReport as VarianceReport,
    VarianceRow as VarianceRow,
    debug as debug,
    explain as explain,
    variance_report as variance_report,
)
from genkit.vi._strategies._alternatives import (
    RLOO as RLOO,
    DisARM as DisARM,
    Enum as Enum,
    LocalExpectation as LocalExpectation,
)
from genkit.vi._strategies._mvd import MVD as MVD
from genkit.vi._strategies._single import (
    AbstractLocalStrategy as AbstractLocalStrategy,
    Detach as Detach,
    Implicit as Implicit,
    Importance as Importance,
    LearnedBaseline as LearnedBaseline,
    MovingBaseline as MovingBaseline,
    Relaxed as Relaxed,
    Reparam as Reparam,
    Score as Score,
    Strategy as Strategy,
)
