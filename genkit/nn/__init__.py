"""Networks `(x, t, cond) -> array` for one example, to be preconditioned into denoisers."""

from genkit.nn._dit import DiT as DiT
from genkit.nn._embeddings import ConditionEmbedding as ConditionEmbedding
from genkit.nn._mlp import MLP as MLP
from genkit.nn._unet import UNet as UNet
