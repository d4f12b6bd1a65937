"""Random cases of the GPU's products under the strict interpreter; `make fuzz` draws many."""

from __future__ import annotations

import os

from tests.kernels.programs import interpreted


def test_random_products_agree_with_float64():
    examples = "400" if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else "3"
    assert interpreted("interpreted_products", examples) == f"{examples} checks"
