"""Statistics of models that other families consume: curvature, covariance, similarity."""
