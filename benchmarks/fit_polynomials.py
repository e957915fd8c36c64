"""Fit the polynomials of hf_sparse/runtime/kernels/activation.py: `EXPONENTIAL_FIT` and `GELU_FIT`.

    e^r                                                    for |r| <= ln 2 / 2, relative error
    GELU(x) = x Phi(x) = x sigmoid(x q(x^2)),  q = log(Phi(x) / Phi(-x)) / x     for x <= 5.5, with
                                                           the weight with which q enters the GELU

By Lawson's iteration: reweighted least squares, which tends to the minimax polynomial. Prints
coefficients, lowest power first, and the largest errors.

    python benchmarks/fit_polynomials.py
"""

import argparse
import math

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()

import numpy as np

try:
    from scipy.special import log_ndtr, ndtr
except ImportError as error:
    raise SystemExit("scipy is needed: pip install 'hf_sparse[train]'") from error

POINTS, ROUNDS = 4000, 300
GELU_DEGREE, GELU_LARGEST = 6, 5.5
EXPONENTIAL_DEGREE = 5


def minimax(powers: np.ndarray, wanted: np.ndarray, effect: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients that make the largest `effect * |powers @ c - wanted|` small, and that error."""
    weight = np.full_like(wanted, 1 / len(wanted))
    for _ in range(ROUNDS):
        scale = np.sqrt(weight) * effect
        fitted = np.linalg.lstsq(powers * scale[:, None], wanted * scale, rcond=None)[0]
        error = abs((powers @ fitted - wanted) * effect)
        weight = weight * (error + 1e-20)
        weight /= weight.sum()
    return fitted, float(error.max())


def show(name: str, fitted: np.ndarray, error: float) -> None:
    """Print one fit, rounded to float32."""
    print(f"{name} =", tuple(float(np.float32(value)) for value in fitted))
    print(f"largest error {error:.1e}")


def main() -> None:
    """Fit and print."""
    nodes = np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    r = nodes * math.log(2) / 2 * 1.0001
    powers = np.vander(r, EXPONENTIAL_DEGREE + 1, increasing=True)
    show("EXPONENTIAL_FIT", *minimax(powers, np.exp(r), np.exp(-r)))

    x = nodes[nodes > 1e-5] * GELU_LARGEST
    q = (log_ndtr(x) - log_ndtr(-x)) / x
    powers = np.vander((x / GELU_LARGEST) ** 2, GELU_DEGREE + 1, increasing=True)
    fitted, error = minimax(powers, q, x * x * ndtr(x) * ndtr(-x))
    show("GELU_FIT", fitted / GELU_LARGEST ** (2.0 * np.arange(GELU_DEGREE + 1)), error)


if __name__ == "__main__":
    main()
