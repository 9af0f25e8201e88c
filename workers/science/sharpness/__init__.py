"""Every sharpness measure by name: an entry is a function that fills `base.Measure`.

Definitions: README.md of the science, "Sharpness" and "Further measures".
"""

from collections.abc import Callable

from workers.science.sharpness.adaptive_average import adaptive_average
from workers.science.sharpness.adaptive_worst import adaptive_worst
from workers.science.sharpness.asam_sharpness import asam_sharpness
from workers.science.sharpness.base import Measure, MeasureInput, MeasureReport
from workers.science.sharpness.closed_forms import closed_forms
from workers.science.sharpness.detector import detector
from workers.science.sharpness.fisher_rao import fisher_rao
from workers.science.sharpness.hessian_trace_network import hessian_trace_network
from workers.science.sharpness.input_curvature import input_curvature
from workers.science.sharpness.input_gradient_norm import input_gradient_norm
from workers.science.sharpness.lipschitz import lipschitz
from workers.science.sharpness.pac_bayes_flatness import pac_bayes_flatness
from workers.science.sharpness.sam_sharpness import sam_sharpness
from workers.science.sharpness.top_eigenvalue_network import top_eigenvalue_network

# `service/specs/measures.py` has the names and parameters: `tests/contract/test_catalog.py` compares them.
MEASURES: dict[str, Callable[..., MeasureReport]] = {
    "closed_forms": closed_forms,
    "hessian_trace_network": hessian_trace_network,
    "top_eigenvalue_network": top_eigenvalue_network,
    "sam_sharpness": sam_sharpness,
    "asam_sharpness": asam_sharpness,
    "adaptive_average": adaptive_average,
    "adaptive_worst": adaptive_worst,
    "fisher_rao": fisher_rao,
    "pac_bayes_flatness": pac_bayes_flatness,
    "input_gradient_norm": input_gradient_norm,
    "input_curvature": input_curvature,
    "lipschitz": lipschitz,
    "detector": detector,
}

__all__ = ["MEASURES", "Measure", "MeasureInput", "MeasureReport"]
