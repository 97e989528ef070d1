"""Every test's Ray cluster uses a throwaway token; Ray reads it when it is first imported."""

import os

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "throwaway-token-of-the-tests"
os.environ.setdefault("OMP_NUM_THREADS", "1")
