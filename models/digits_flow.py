"""Flow matching on handwritten digits, along the path of least kinetic energy.

What: a residual perceptron that predicts the velocity, trained on the 1,400 training digits of `gk.data.digits()` along
the kinetic-optimal path of these data; `PATH = gk.diffusion.CondOT()` trains the straight path beside it.
Source: Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023; Shaul et al., "On Kinetic Optimal Probability
Paths for Generative Models", ICML 2023.
Cost: a minute on two cores.
Expect: digits in 12 evaluations of `samplers/dpmpp.py`.
"""

import optax

import genkit as gk


NUM_STEPS = 4_000

digits = gk.data.digits()
PATH = gk.diffusion.KineticOptimal.from_data(digits.x_train[:512], num_nodes=256)


def build(key):
    """The denoiser before training."""
    net = gk.nn.MLP((1, 8, 8), width=256, depth=3, num_labels=10, key=key)
    return gk.diffusion.Preconditioned(net, "velocity", schedule=PATH)


recipe = gk.Recipe(
    build=build,
    data=gk.data.Batches((digits.x_train, digits.y_train), batch_size=128),
    phases=gk.Phase(
        gk.diffusion.FlowMatching(PATH, cond_dropout=0.1),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, NUM_STEPS, 2e-5), weight_decay=1e-2),
    ),
    num_steps=NUM_STEPS,
    ema=0.998,
    name="digits_flow",
)
