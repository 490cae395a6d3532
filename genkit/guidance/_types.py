"""Types that the methods of a guidance share."""

from collections.abc import Mapping

from jaxtyping import Array, Bool, Float, PyTree


# Which slots are needed now, by name.
Needs = Mapping[str, bool | Bool[Array, ""]]
# The guided prediction, the new carry, and what is reported.
Combined = tuple[Float[Array, " *shape"], PyTree, dict[str, Array]]
