"""Networks `(x, t, cond) -> array` for one example, to be preconditioned into denoisers."""

from ._dit import DiT as DiT
from ._embeddings import ConditionEmbedding as ConditionEmbedding
from ._mlp import MLP as MLP
from ._unet import UNet as UNet
