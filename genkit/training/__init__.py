"""Training: recipes, phases, objectives, and the loop behind `gk.fit`."""

from genkit.training._fit import (
    fit as fit,
    restore_fitted as restore_fitted,
)
from genkit.training._fitted import (
    Fitted as Fitted,
    Interrupted as Interrupted,
)
from genkit.training._host import (
    AbstractData as AbstractData,
)
from genkit.training._recipe import (
    Objective as Objective,
    Phase as Phase,
    Recipe as Recipe,
    Source as Source,
    model_updates as model_updates,
)
