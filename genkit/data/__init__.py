"""Small real and toy data sets as functions, and batches of them."""

from genkit.data._batches import Batches as Batches, Generated as Generated
from genkit.data._digits import Digits as Digits, digits as digits
from genkit.data._host import Host as Host
from genkit.data._nile import nile as nile
from genkit.data._toys import (
    checkerboard as checkerboard,
    eight_gaussians as eight_gaussians,
    pinwheel as pinwheel,
    ring as ring,
    swiss_roll as swiss_roll,
    two_gaussians as two_gaussians,
    two_moons as two_moons,
)
