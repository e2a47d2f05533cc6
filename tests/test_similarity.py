"""How alike features are: linear CKA."""

import numpy as np
import pytest
import torch

from incubate_lib.report.live import representations
from incubate_lib.report.live.representations import linear_cka

# -- similarity ---------------------------------------------------------------------------------------------------------------


def test_cka_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 40, 6, 3, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(18, 18, generator=generator, dtype=torch.float64)).Q
    stretched = x.flatten(1) * torch.logspace(-2, 2, 18, dtype=torch.float64)
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 7 * (x.flatten(1) @ rotation) + 3) == pytest.approx(1), "rotations, multiples, shifts change nothing"
    assert linear_cka(x, stretched) < 0.9, "other linear maps do"
    assert linear_cka(x, noise) == pytest.approx(linear_cka(noise, x)) and abs(linear_cka(x, noise)) < 0.25
    assert np.isnan(linear_cka(x, torch.ones(40, 2)))


def test_unrelated_features_are_not_alike_however_wide_they_are():
    x, y = torch.randn(2, 64, 2000, generator=torch.Generator().manual_seed(1))
    assert abs(linear_cka(x, y)) < 0.05
    whole = linear_cka(x, x + y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(representations, "PIECE", 300)
        assert linear_cka(x, x + y) == pytest.approx(whole), "whatever the pieces in which it is added up"


@pytest.mark.parametrize(("n", "m"), [(3, 3), (10, 9)])
def test_cka_takes_enough_of_the_same_images(n, m):
    with pytest.raises(ValueError, match=f"{n} and {m} images"):
        linear_cka(torch.randn(n, 5), torch.randn(m, 5))
