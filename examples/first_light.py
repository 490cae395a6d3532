# %% [markdown]
# # First light: digits from noise
#
# Train a class-conditional diffusion model on 1,400 handwritten digits, draw with guidance, look, and judge. The whole
# page takes less than a minute on two cores; `genkit demo` does the same with a longer training and keeps the run.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import genkit as gk


digits = gk.data.digits()
sigma_data = float(digits.x_train.std())

# %% [markdown]
# ## Train
#
# A recipe says how the model is built, where its batches come from, what it minimizes and how long. A tenth of the
# labels is dropped during training, so that the network also learns what digits look like in general: guidance needs
# both.

# %%
num_steps = 3_000


def build(key):
    """A residual perceptron under EDM preconditioning."""
    net = gk.nn.MLP((1, 8, 8), width=256, depth=3, num_labels=10, key=key)
    return gk.diffusion.Preconditioned(net, "F", sigma_data=sigma_data)


recipe = gk.Recipe(
    build=build,
    data=gk.data.Batches((digits.x_train, digits.y_train), batch_size=128),
    phases=gk.Phase(
        gk.diffusion.DenoisingScoreMatching(cond_dropout=0.1),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, num_steps, 2e-5), weight_decay=1e-2),
    ),
    num_steps=num_steps,
    ema=0.995,
)
fitted = gk.fit(recipe, key=jax.random.key(0))

# %%
curve = fitted.log["loss"].reshape(-1, 25).mean(axis=1)
fig, ax = plt.subplots(figsize=(6, 2.4), layout="constrained")
ax.plot(np.arange(len(curve)) * 25, curve, color="#2f5d8a")
ax.set(xlabel="step", ylabel="loss", yscale="log")
plt.show()

# %% [markdown]
# ## Draw
#
# A sampler is a table of numbers: here Heun's method on the grid of {cite}`karras2022`. Guidance exaggerates what sets
# the requested class apart, at intermediate noise only; outside of the interval the second evaluation is not made.

# %%
sampler = gk.diffusion.heun(gk.diffusion.karras(18, 0.002, 80.0))
guidance = gk.guidance.interval(gk.guidance.cfg(1.5), sigma_lo=0.05, sigma_hi=5.0)
labels = np.repeat(np.arange(10), 12)
draws = gk.sample(sampler, fitted.ema, len(labels), cond=labels, guidance=guidance, key=jax.random.key(1))
print(f"{sampler.nfe} evaluations without guidance, {draws.nfe.mean():.0f} with it")

# %%
images = np.asarray(draws.value).reshape(10, 12, 8, 8)
fig, axes = plt.subplots(10, 12, figsize=(7.2, 6), layout="constrained")
for ax, image in zip(axes.ravel(), images.reshape(-1, 8, 8), strict=True):
    ax.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Judge
#
# Three questions, each beside what real digits give. Do the draws show the class that was asked for? Are they where the
# held-out digits are (precision), and is every held-out digit near some draw (recall)? Are they copies of the training
# set (a ratio of nearest distances well below one would say so)?

# %%
from sklearn.svm import SVC


def flat(x):
    """Images as rows."""
    return np.asarray(x).reshape(len(x), -1)


train, test = flat(digits.x_train), flat(digits.x_test)
labels = np.arange(len(test)) % 10
free = gk.sample(sampler, fitted.ema, len(test), cond=labels, key=jax.random.key(2)).value
guided = gk.sample(sampler, fitted.ema, len(test), cond=labels, guidance=guidance, key=jax.random.key(2)).value
classifier = SVC(gamma=0.02, C=10.0).fit(train, digits.y_train)

print(f"class accuracy          guided {classifier.score(flat(guided), labels):.3f}", end="")
print(f"   unguided {classifier.score(flat(free), labels):.3f}   real {classifier.score(test, digits.y_test):.3f}")
# The digits stand in the order of their writers: a random part of the training set, not the first.
part = train[np.random.default_rng(0).permutation(len(train))[: len(test)]]
for name, x in (("draws", flat(free)), ("training digits", part)):
    precision, recall = gk.divergence.precision_recall(test, x, k=3)
    distance = gk.divergence.energy_distance(x, test)
    print(f"{name:>16}: precision {precision:.2f}, recall {recall:.2f}, energy distance {distance:.4f}")
print(f"nearest-distance ratio {gk.divergence.nearest_distance_ratio(flat(free), train, test):.2f}")
