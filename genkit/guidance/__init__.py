"""Guidance: objects that steer a denoiser, combine, carry state, and say which evaluations they need."""

from genkit._core import (
    AbstractPost as AbstractPost,
    Guided as Guided,
    Prediction as Prediction,
    Slot as Slot,
)

from ._adaptive import adaptive as adaptive
from ._direction import (
    AbstractDirectionMap as AbstractDirectionMap,
    ClipNorm as ClipNorm,
    Damp as Damp,
    Direction as Direction,
    Momentum as Momentum,
    Project as Project,
    apg as apg,
)
from ._gates import interval as interval, policy as policy, step_adaptive as step_adaptive
from ._gfcg import gfcg as gfcg
from ._gradient import classifier as classifier, loss_guidance as loss_guidance
from ._linear import (
    Linear as Linear,
    autoguide as autoguide,
    cfg as cfg,
    cfgpp as cfgpp,
    compose as compose,
    negative as negative,
    perturbed as perturbed,
)
from ._linear_ag import LinearFit as LinearFit, linear_ag as linear_ag
from ._linear_ag_fit import LinearSampler as LinearSampler, fit_linear_ag as fit_linear_ag
from ._perpneg import perpneg as perpneg
from ._policy import PolicyFit as PolicyFit, search_policy as search_policy
from ._posts import (
    DynamicThreshold as DynamicThreshold,
    NormCap as NormCap,
    Rescale as Rescale,
    dynamic_threshold as dynamic_threshold,
    rescale as rescale,
)
from ._reflect import reflect as reflect
from ._steer import fkc as fkc, steer as steer
from ._weights import (
    AbstractWeight as AbstractWeight,
    Constant as Constant,
    OfNoise as OfNoise,
    PerStep as PerStep,
    PlusPlus as PlusPlus,
    PowerCosine as PowerCosine,
    Ramp as Ramp,
)
