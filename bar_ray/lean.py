"""Starting without what others import only because it is there.

DeepSpeed's autotuner imports MLflow, transformers' assisted generation scikit-learn, which lm-eval
brings, its losses of detection and vLLM's audio SciPy: seconds of every worker, for parts of them
that are never used here.
"""

import contextlib
import sys
from collections.abc import Iterator

UNUSED = ("mlflow", "sklearn", "scipy")


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """What is imported inside takes `UNUSED` for not installed; afterwards they can be imported."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # None: importing it fails, and nothing finds it
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
