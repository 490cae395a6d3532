"""One evaluation of a distilled student.

What: the student's own map from a standard normal to an example.
Source: Yin et al., "One-step Diffusion with Distribution Matching Distillation", CVPR 2024.
Cost: 1 evaluation.
Expect: what the student has learned; see `models/digits_onestep.py`.
"""

import genkit as gk


sampler = gk.distill.StudentSampler()
