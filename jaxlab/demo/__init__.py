"""`jaxlab demo`: four experts on shifted digits, merged as any checkpoint is.

Trains a small network on scikit-learn's digits, fine-tunes it on four shifts of them,
saves base and experts as safetensors, merges them by recipe files through `io.merge`,
and reports how every model does on every task: a table, figures and a page.
"""

from ._results import Results as Results
from ._run import Settings as Settings, phases as phases, run as run
