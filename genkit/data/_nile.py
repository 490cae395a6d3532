"""The annual flow of the Nile at Aswan, 1871 to 1970."""

import numpy as np
from jaxtyping import Float


# Cobb, "The problem of the Nile: conditional solution to a changepoint problem", Biometrika 65 (1978), table 1; also in
# R's `datasets::Nile` and in statsmodels. Public domain. Unit: 10^8 cubic meters.
_FLOW = """
1120 1160  963 1210 1160 1160  813 1230 1370 1140  995  935 1110  994 1020  960 1180  799  958 1140
1100 1210 1150 1250 1260 1220 1030 1100  774  840  874  694  940  833  701  916  692 1020 1050  969
 831  726  456  824  702 1120 1100  832  764  821  768  845  864  862  698  845  744  796 1040  759
 781  865  845  944  984  897  822 1010  771  676  649  846  812  742  801 1040  860  874  848  890
 744  749  838 1050  918  986  797  923  975  815 1020  906  901 1170  912  746  919  718  714  740
"""


def nile() -> tuple[Float[np.ndarray, " 100"], Float[np.ndarray, " 100"]]:
    """Load the annual flow of the Nile at Aswan, a classic of long memory (and of change points).

    Returns:
        The years 1871 to 1970 and the flow in 10^8 cubic meters, float64, shape (100,) each.

    Example:
        >>> from genkit.data import nile
        >>> years, flow = nile()
        >>> float(years[0]), float(flow[0])
        (1871.0, 1120.0)

    Source: Cobb, "The problem of the Nile: conditional solution to a changepoint problem", Biometrika, 1978.
    """
    flow = np.array(_FLOW.split(), np.float64)
    return np.arange(1871.0, 1971.0), flow
