"""Networks as functions of pytrees, and the configurations that name them."""
