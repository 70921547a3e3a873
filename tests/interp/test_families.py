"""Laws of every family, and Hermite's against a table written by hand and numpy."""

from itertools import product
from math import factorial, sqrt

import numpy as np
import pytest
import torch
from numpy.polynomial import hermite_e

from orthoact.interp import FAMILIES, Family, OrthoactError, get_family

# He_0 .. He_9, lowest power first
TABLE = [
    [1],
    [0, 1],
    [-1, 0, 1],
    [0, -3, 0, 1],
    [3, 0, -6, 0, 1],
    [0, 15, 0, -10, 0, 1],
    [-15, 0, 45, 0, -15, 0, 1],
    [0, -105, 0, 105, 0, -21, 0, 1],
    [105, 0, -420, 0, 210, 0, -28, 0, 1],
    [0, 945, 0, -1260, 0, 378, 0, -36, 0, 1],
]


def cases():
    """Each family at its lowest, its highest and some degrees between."""
    for name, family in FAMILIES.items():
        for degree in sorted({family.degrees[0], 2, 8, 13, family.degrees[-1]} & set(family.degrees)):
            yield pytest.param(family, degree, id=f"{name}-{degree}")


def core(family: Family, degree: int, points: int = 61) -> np.ndarray:
    return np.linspace(-1, 1, points) * family.reach(degree)


def coefficients(family: Family, degree: int) -> np.ndarray:
    return np.random.default_rng(degree).normal(size=family.size(degree))


each = pytest.mark.parametrize(("family", "degree"), list(cases()))


# -- every family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_registry(name):
    family = get_family(name)
    assert family is FAMILIES[name] and family.name == name
    for field in ("formula", "smoothness", "reference"):
        assert getattr(family, field), f"{name}: {field} is empty"
    assert len(family.degrees) > 1 and family.degrees[0] >= 1


@pytest.mark.parametrize("name", ["chebyshev", "", "Hermite", "hermit"])
def test_unknown_family_lists_the_known(name):
    with pytest.raises(OrthoactError, match="unknown family") as error:
        get_family(name)
    assert repr(name) in str(error.value)
    assert all(known in str(error.value) for known in FAMILIES)


@each
def test_size_and_shape(family, degree):
    size = family.size(degree)
    for z in (np.zeros(()), np.zeros((2, 3)), torch.zeros(2, 3), torch.zeros(0)):
        for part in (family.basis(z, degree), family.slopes(z, degree)):
            assert len(part) == size
            assert {tuple(v.shape) for v in part} == {tuple(z.shape)}
            assert {type(v) for v in part} <= {type(z), np.float64}, "numpy in, numpy out; torch in, torch out"


@each
def test_reach_grows(family, degree):
    assert family.reach(degree) > 0
    if degree + 1 in family.degrees:
        assert family.reach(degree + 1) >= family.reach(degree)


@each
def test_numpy_and_torch_agree(family, degree):
    z = core(family, degree)
    for method in (family.basis, family.slopes):
        ours, theirs = method(z, degree), method(torch.from_numpy(z), degree)
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert b.dtype == torch.float64
            np.testing.assert_allclose(b.numpy(), a, rtol=1e-12, atol=1e-12, err_msg=f"{method.__name__}, k={k}")


@each
def test_slopes_are_the_derivatives_by_autograd(family, degree):
    z = torch.from_numpy(core(family, degree)).requires_grad_()
    for k, (value, slope) in enumerate(zip(family.basis(z, degree), family.slopes(z, degree), strict=True)):
        (wanted,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
        scale = 1 + wanted.abs().max()
        torch.testing.assert_close(slope / scale, wanted / scale, rtol=0, atol=1e-12, msg=lambda m, k=k: f"k={k}: {m}")


@each
def test_slopes_are_the_derivatives_by_differences(family, degree):
    z, h = core(family, degree), 1e-5
    ahead, behind, slopes = family.basis(z + h, degree), family.basis(z - h, degree), family.slopes(z, degree)
    for k, (a, b, slope) in enumerate(zip(ahead, behind, slopes, strict=True)):
        scale = 1 + np.abs(slope).max()
        np.testing.assert_allclose(slope / scale, (a - b) / (2 * h) / scale, atol=1e-6, err_msg=f"k={k}")


@each
@pytest.mark.parametrize(("kind", "dtype"), list(product(["numpy", "torch"], ["float64", "float32"])))
def test_evaluate_is_basis_times_coefficients(family, degree, kind, dtype):
    z, c = core(family, degree).astype(dtype), coefficients(family, degree).astype(dtype)
    basis = np.stack(family.basis(z.astype(np.float64), degree), axis=-1)
    wanted, size = basis @ c.astype(np.float64), np.abs(basis) @ np.abs(c)
    got = (
        family.evaluate(list(c), z)
        if kind == "numpy"
        else family.evaluate(list(torch.from_numpy(c)), torch.from_numpy(z))
    )
    assert str(got.dtype).removeprefix("torch.") == dtype
    error = np.abs(np.asarray(got) - wanted) / size
    assert error.max() < {"float64": 1e-13, "float32": 1e-5}[dtype], f"relative to the terms: {error.max():.1e}"


@each
def test_evaluate_gives_the_basis_for_unit_coefficients(family, degree):
    z = core(family, degree)
    for k, value in enumerate(family.basis(z, degree)):
        unit = [float(i == k) for i in range(family.size(degree))]
        scale = 1 + np.abs(value).max()
        np.testing.assert_allclose(family.evaluate(unit, z) / scale, value / scale, atol=1e-12, err_msg=f"k={k}")


@each
def test_evaluate_broadcasts_coefficients(family, degree):
    z = torch.from_numpy(core(family, degree, 8)).reshape(4, 2)
    c = torch.randn(family.size(degree), 2, dtype=torch.float64)
    wanted = torch.stack([family.evaluate(list(c[:, i]), z[:, i]) for i in range(2)], dim=1)
    torch.testing.assert_close(family.evaluate(list(c), z), wanted)


# -- Hermite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(len(TABLE)))
def test_hermite_equals_the_table(k):
    z = np.linspace(-4, 4, 33)
    wanted = sum(c * z**power for power, c in enumerate(TABLE[k]))
    for degree in range(max(k, 1), len(TABLE)):
        got = FAMILIES["hermite"].basis(z, degree)[k] * sqrt(factorial(k))
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-9, err_msg=f"He_{k} at degree {degree}")


@pytest.mark.parametrize("k", range(25))
def test_hermite_equals_numpy(k):
    z, unit = np.linspace(-6, 6, 49), np.eye(25)[k]
    basis, slopes = FAMILIES["hermite"].basis(z, 24)[k], FAMILIES["hermite"].slopes(z, 24)[k]
    norm = sqrt(factorial(k))
    wanted = hermite_e.hermeval(z, unit) / norm
    np.testing.assert_allclose(basis, wanted, rtol=1e-10, atol=1e-10 * np.abs(wanted).max(), err_msg=f"h_{k}")
    wanted = hermite_e.hermeval(z, hermite_e.hermeder(unit)) / norm
    np.testing.assert_allclose(slopes, wanted, rtol=1e-10, atol=1e-10 * np.abs(wanted).max(), err_msg=f"h_{k}'")


def test_hermite_is_orthonormal_under_the_standard_normal_law():
    z, w = hermite_e.hermegauss(40)  # exact for polynomials up to degree 79
    degree = FAMILIES["hermite"].degrees[-1]
    basis = np.stack(FAMILIES["hermite"].basis(z, degree))
    gram = (basis * w / w.sum()) @ basis.T
    np.testing.assert_allclose(gram, np.eye(degree + 1), atol=1e-10)


@pytest.mark.parametrize("degree", [1, 8, 24])
def test_hermite_has_one_coefficient_more_than_its_degree(degree):
    assert FAMILIES["hermite"].size(degree) == degree + 1
