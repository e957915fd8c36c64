"""Fit the polynomial of the compiled GELU: `GELU_FIT` in hf_sparse/runtime/activation.py.

GELU(x) = x Phi(x) = x sigmoid(x q(x^2)), q(x^2) = log(Phi(x) / Phi(-x)) / x. q is fitted on
[0, LARGEST] by Lawson's iteration (reweighted least squares, which tends to the minimax polynomial)
with the weight with which its error enters the GELU. Prints coefficients and errors.
"""

import numpy as np
from scipy.special import log_ndtr, ndtr

DEGREE, LARGEST, POINTS, ROUNDS = 6, 5.5, 4000, 300


def main() -> None:
    """Fit and print."""
    x = np.cos(np.pi * (np.arange(POINTS) + 0.5) / (2 * POINTS)) * LARGEST
    x = x[x > 1e-4]
    q = (log_ndtr(x) - log_ndtr(-x)) / x
    effect = x * x * ndtr(x) * ndtr(-x)
    powers = np.vander((x / LARGEST) ** 2, DEGREE + 1, increasing=True)
    weight = np.full_like(x, 1 / len(x))
    for _ in range(ROUNDS):
        scale = np.sqrt(weight) * effect
        fitted = np.linalg.lstsq(powers * scale[:, None], q * scale, rcond=None)[0]
        error = abs((powers @ fitted - q) * effect)
        weight = weight * (error + 1e-18)
        weight /= weight.sum()
    fitted /= LARGEST ** (2.0 * np.arange(DEGREE + 1))
    print("GELU_FIT =", tuple(float(np.float32(value)) for value in fitted))
    print(f"error of the fit {error.max():.1e}")


if __name__ == "__main__":
    main()
