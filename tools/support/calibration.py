"""Whether a network's probabilities can be believed: the reliability diagram's bins, and the expected calibration error."""

from typing import Any

import numpy as np

BINS = 15  # as Guo et al. 2017, "On Calibration of Modern Neural Networks"


def calibration(probability: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Compare the probabilities of answers with how often they are right.

    Args:
        probability: (n) of the first answer, in [0, 1]; where it is not finite there is no answer, and the image is left out.
        correct: (n) bool, whether that answer is right.

    Returns:
        "images" that count, the expected calibration error "ece" in percent (the mean over images of the distance between
        accuracy and mean probability in their bin; None without an image), and "bins" of equal width, each from above "low" to
        "high" with its images, and where it has some their mean probability and accuracy in [0, 1].
    """
    finite = np.isfinite(probability)
    probability, correct = probability[finite].astype(np.float64), correct[finite]
    edges = np.arange(BINS + 1) / BINS
    place = np.clip(np.ceil(probability * BINS).astype(int) - 1, 0, BINS - 1)
    images = np.bincount(place, minlength=BINS)
    surely = np.bincount(place, weights=probability, minlength=BINS)
    right = np.bincount(place, weights=correct.astype(np.float64), minlength=BINS)
    bins = [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "images": int(images[b]),
            "probability": float(surely[b] / images[b]) if images[b] else None,
            "accuracy": float(right[b] / images[b]) if images[b] else None,
        }
        for b in range(BINS)
    ]
    error = 100 * float(np.abs(right - surely).sum()) / len(probability) if len(probability) else None
    return {"images": len(probability), "ece": error, "bins": bins}
