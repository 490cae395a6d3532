"""Guidance: objects that steer a denoiser, combine, carry state, and say which evaluations they need."""

from genkit.guidance._adaptive import adaptive as adaptive
from genkit.guidance._direction import (
    AbstractDirectionMap as AbstractDirectionMap,
    ClipNorm as ClipNorm,
    Direction as Direction,
    ExponentialDamping as ExponentialDamping,
    Momentum as Momentum,
    Project as Project,
    apg as apg,
)
from genkit.guidance._gates import interval as interval, policy as policy, step_adaptive as step_adaptive
from genkit.guidance._gfcg import gfcg as gfcg
from genkit.guidance._gradient import classifier as classifier, loss_guidance as loss_guidance
from genkit.guidance._linear import (
    Linear as Linear,
    autoguide as autoguide,
    cfg as cfg,
    cfgpp as cfgpp,
    compose as compose,
    negative as negative,
    perturbed as perturbed,
)
from genkit.guidance._linear_ag import LinearFit as LinearFit, linear_ag as linear_ag
from genkit.guidance._linear_ag_fit import LinearSampler as LinearSampler, fit_linear_ag as fit_linear_ag
from genkit.guidance._perpneg import perpneg as perpneg
from genkit.guidance._policy import PolicyFit as PolicyFit, search_policy as search_policy
from genkit.guidance._posts import (
    NormCap as NormCap,
    dynamic_threshold as dynamic_threshold,
    rescale as rescale,
)
from genkit.guidance._reflect import reflect as reflect
from genkit.guidance._steer import fkc as fkc, steer as steer
from genkit.guidance._weights import (
    AbstractWeight as AbstractWeight,
    CFGPlusPlus as CFGPlusPlus,
    Constant as Constant,
    FunctionOfSigma as FunctionOfSigma,
    PerStep as PerStep,
    PowerCosine as PowerCosine,
    Ramp as Ramp,
)
from genkit.sampling import (
    Guided as Guided,
    Prediction as Prediction,
    PredictionTransform as PredictionTransform,
    Slot as Slot,
)
