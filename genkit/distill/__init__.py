"""Distillation: a teacher into a generator of one or a few steps, by any f-divergence; policies likewise."""

from genkit.distill._consistency import (
    ConsistencyModel as ConsistencyModel,
    ConsistencyObjective as ConsistencyObjective,
    Pair as Pair,
    TeacherData as TeacherData,
    consistency as consistency,
)
from genkit.distill._distill import (
    Conditions as Conditions,
    Distilled as Distilled,
    distill as distill,
    recipe as recipe,
)
from genkit.distill._fdpg import (
    FDPG as FDPG,
    AbstractPolicy as AbstractPolicy,
    AutoregressivePolicy as AutoregressivePolicy,
    LawPolicy as LawPolicy,
    Tracked as Tracked,
    fdpg as fdpg,
    policy_recipe as policy_recipe,
)
from genkit.distill._losses import (
    DSD as DSD,
    SDS as SDS,
    AbstractLoss as AbstractLoss,
    Adversarial as Adversarial,
    FDistill as FDistill,
    PairRegression as PairRegression,
    SiD as SiD,
    SumLoss as SumLoss,
    dmd as dmd,
    vsd as vsd,
)
from genkit.distill._model import (
    Distillation as Distillation,
    TeacherSamples as TeacherSamples,
    teacher_pool as teacher_pool,
)
from genkit.distill._monitors import divergence_from_scores as divergence_from_scores, mode_coverage as mode_coverage
from genkit.distill._objectives import (
    CriticObjective as CriticObjective,
    Discriminator as Discriminator,
    StudentObjective as StudentObjective,
    cycle as cycle,
)
from genkit.distill._ratios import (
    AbstractRatio as AbstractRatio,
    DiscriminatorRatio as DiscriminatorRatio,
    EmpiricalRatio as EmpiricalRatio,
    ExactRatio as ExactRatio,
    NoisyBatch as NoisyBatch,
    NoRatio as NoRatio,
    ScoreDifference as ScoreDifference,
    ScoreRatio as ScoreRatio,
)
from genkit.distill._samplers import Renoise as Renoise, StudentSampler as StudentSampler
from genkit.distill._students import FewStep as FewStep, OneStep as OneStep
