"""Statistics of models that other families consume: curvature, moments, similarity."""

from ._activations import (
    Norms as Norms,
    activation_norms as activation_norms,
    covariance as covariance,
    gram as gram,
)
from ._cka import Hsic as Hsic, cka as cka, hsic as hsic, similarity as similarity
from ._connectivity import (
    barrier as barrier,
    linear_connectivity as linear_connectivity,
)
from ._fisher import (
    fisher as fisher,
    fisher_empirical as fisher_empirical,
    fisher_monte_carlo as fisher_monte_carlo,
)
from ._gaussian import (
    Gaussian as Gaussian,
    frechet as frechet,
    gaussian as gaussian,
    pool as pool,
)
from ._hessian import (
    hessian_diagonal as hessian_diagonal,
    hessian_trace as hessian_trace,
)
