"""Distillation: a teacher into a generator of one or a few steps, by any f-divergence; policies likewise."""

from ._consistency import (
    ConsistencyModel as ConsistencyModel,
    ConsistencyObjective as ConsistencyObjective,
    Pair as Pair,
    TeacherData as TeacherData,
    consistency as consistency,
)
from ._distill import (
    Conditions as Conditions,
    Distilled as Distilled,
    distill as distill,
    recipe as recipe,
)
from ._fdpg import (
    FDPG as FDPG,
    AbstractPolicy as AbstractPolicy,
    AutoregressivePolicy as AutoregressivePolicy,
    LawPolicy as LawPolicy,
    Tracked as Tracked,
    fdpg as fdpg,
    policy_recipe as policy_recipe,
)
from ._losses import (
    DSD as DSD,
    SDS as SDS,
    AbstractLoss as AbstractLoss,
    Adversarial as Adversarial,
    FDistill as FDistill,
    Regression as Regression,
    SiD as SiD,
    SumLoss as SumLoss,
    dmd as dmd,
    vsd as vsd,
)
from ._model import Distillation as Distillation, Positives as Positives, teacher_pool as teacher_pool
from ._monitors import divergence_from_scores as divergence_from_scores, mode_coverage as mode_coverage
from ._objectives import (
    CriticObjective as CriticObjective,
    Discriminator as Discriminator,
    StudentObjective as StudentObjective,
    cycle as cycle,
)
from ._ratios import (
    AbstractRatio as AbstractRatio,
    DiscriminatorRatio as DiscriminatorRatio,
    EmpiricalRatio as EmpiricalRatio,
    ExactRatio as ExactRatio,
    Gap as Gap,
    Noised as Noised,
    NoRatio as NoRatio,
    ScoreRatio as ScoreRatio,
)
from ._samplers import Generate as Generate, Renoise as Renoise
from ._students import FewStep as FewStep, OneStep as OneStep
