"""The numbers that measures leave: the closed forms of the penultimate layer, and those of each further measure."""

from service.specs.numbers.base import (
    COUNT,
    DISTANCE,
    FEATURES,
    FLAG,
    LIPSCHITZ,
    LOG,
    LOG_SHARE,
    LOSS,
    LOSS_CHANGE,
    OURS,
    PAPER,
    POSITIVE,
    REAL,
    SHARE,
    Group,
    Number,
    Unit,
)

PETZKA = "Petzka et al. 2021"
NOBODY = "no such image, or the statistic falls on an exact zero"
NOT_POSITIVE = "the value is not positive"
ONE_DRAW = "one draw"


def _closed_form(name: str, formula: str, source: str, unit: Unit = LOG) -> tuple[Number, Number]:
    """Its summary over images, in the logarithm, and how many exact zeros have none."""
    return (
        Number(f"{{split}}{name}_{{log_statistic}}{{population}}", formula, unit, NOBODY, source),
        Number(f"{{split}}{name}_n_zero{{population}}", "exact zeros among them; they have no logarithm", COUNT),
    )


CLOSED_FORMS = Group(
    "closed_forms",
    "measure",
    "closed_forms",
    "workers/science/sharpness/closed_forms.py",
    OURS,
    (
        Number("{split}n{population}", "images with finite features and logits", COUNT),
        Number("{split}n_non_finite", "images with NaN or infinite ones; left out", COUNT),
        *_closed_form("log_hessian_trace", "log(||phi||^2 sum_j p_j (1 - p_j))", PAPER),
        *_closed_form("log_relative_sharpness", "log(||W||_F^2 Tr H)", PAPER),
        *_closed_form("log_relative_sharpness_unsquared", "log(||W||_F Tr H)", "the code of arXiv 2405.16918"),
        *_closed_form("log_relative_flatness", "log(||phi||^2 sum_{i<j} p_i p_j ||w_i - w_j||^2)", PETZKA),
        *_closed_form("log_gauge_fixed_relative_sharpness", "log relative sharpness after W - mean row", OURS),
        *_closed_form("log_top_eigenvalue", "log(||phi||^2 lambda_max(diag p - p p^T))", OURS),
        *_closed_form("log_softmax_trace", "log sum_j p_j (1 - p_j)", PAPER, LOG_SHARE),
        *_closed_form("log_rest", "log(1 - max_j p_j)", OURS, LOG_SHARE),
        Number("{split}loss_{statistic}{population}", "cross-entropy", LOSS, "no such image"),
        Number("{split}feature_norm_min{population}", "least ||phi||", FEATURES, "no such image"),
        Number("{split}feature_norm_q01{population}", "1 % quantile of ||phi||", FEATURES, "no such image"),
        Number(
            "{split}log_dataset_top_eigenvalue{population}",
            "log lambda_max of mean_n H_n, by Lanczos",
            LOG,
            "it is exactly 0; absent with no such image",
        ),
        Number("{split}log_dataset_top_eigenvalue_iterations{population}", "products that Lanczos took", COUNT),
        Number("{split}log_dataset_top_eigenvalue_converged{population}", "residual below 1e-6 of the value", FLAG),
        Number("weight_norm", "||W||_F of the scaled head", POSITIVE),
        Number("weight_norm_unscaled", "||W||_F / s", POSITIVE),
        Number("log_weight_norm", "log ||W||_F of the scaled head", LOG, "W is 0"),
    ),
)


def _measure(name: str, source: str, *numbers: Number) -> Group:
    return Group(name, "measure", name, f"workers/science/sharpness/{name}.py", source, numbers)


def _logged(name: str, formula: str, unit: Unit = LOSS_CHANGE) -> tuple[Number, Number]:
    return Number(name, formula, unit), Number(f"log_{name}", "its logarithm", LOG, NOT_POSITIVE)


def _of_input(name: str, formula: str) -> tuple[Number, Number]:
    return (
        Number(f"{name}_{{log_statistic}}{{population}}", formula, LOG, NOBODY),
        Number(f"{name}_n_zero{{population}}", "exact zeros among them", COUNT),
    )


def _detector(name: str, of: str, *more: Number) -> tuple[Number, ...]:
    few = "fewer than five images flip"
    return (
        Number(f"{name}_accuracy", f"stump, held-out accuracy in 5 folds, {of}", SHARE, few),
        Number(f"{name}_auroc", f"log kappa, held-out AUROC in 5 folds, {of}", SHARE, few),
        Number(f"{name}_n", f"clean-correct images that flip, {of}", COUNT),
        *more,
    )


FLIPS = "clean-correct images that it flips, / clean-correct"
GROUPS = (
    CLOSED_FORMS,
    _measure(
        "hessian_trace_network",
        "Hutchinson 1990",
        *_logged("hessian_trace_network", "Tr of the Hessian of the training loss in all weights", REAL),
        Number("hessian_trace_network_standard_error", "of the mean over probes", POSITIVE, "one probe"),
        Number("hessian_trace_penultimate", "Tr of the block of the head's weight", REAL),
        Number("hessian_trace_penultimate_standard_error", "of the mean over probes", POSITIVE, "one probe"),
        Number(
            "hessian_trace_penultimate_share",
            "hessian_trace_penultimate / hessian_trace_network",
            REAL,
            "hessian_trace_network is not positive",
        ),
    ),
    _measure(
        "top_eigenvalue_network",
        "Ghorbani et al. 2019",
        *_logged("top_eigenvalue_network", "lambda_max of the Hessian of the training loss, by Lanczos", REAL),
        Number("top_eigenvalue_network_residual", "||H v - lambda v||", POSITIVE),
        Number("top_eigenvalue_network_iterations", "products that Lanczos took", COUNT),
        Number("top_eigenvalue_network_converged", "residual <= tolerance x value", FLAG),
    ),
    _measure(
        "sam_sharpness",
        "Foret et al. 2021",
        *_logged("sam_sharpness", "mean over batches of L(w + rho g / ||g||) - L(w)"),
    ),
    _measure(
        "asam_sharpness",
        "Kwon et al. 2021",
        *_logged("asam_sharpness", "mean of L(w + rho T^2 g / ||T g||) - L(w), T = |w| + eta"),
    ),
    _measure(
        "adaptive_average",
        "Andriushchenko et al. 2023",
        *_logged("adaptive_average", "E L(w + delta) - L(w), delta_i ~ N(0, (rho |w_i|)^2)"),
        Number("adaptive_average_standard_error", "of the mean over draws", POSITIVE, ONE_DRAW),
        Number("adaptive_average_normalised", "the same with logits of mean 0 and deviation 1", LOSS_CHANGE),
        Number("adaptive_average_normalised_standard_error", "of the mean over draws", POSITIVE, ONE_DRAW),
    ),
    _measure(
        "adaptive_worst",
        "Andriushchenko et al. 2023",
        *_logged("adaptive_worst", "mean over batches of max_{|delta_i| <= rho |w_i|} L(w + delta) - L(w)"),
        Number("adaptive_worst_normalised", "the same with logits of mean 0 and deviation 1", LOSS_CHANGE),
    ),
    _measure("fisher_rao", "Liang et al. 2019", *_logged("fisher_rao", "E <p - e_y, z>^2", POSITIVE)),
    _measure(
        "pac_bayes_flatness",
        "Jiang et al. 2020",
        Number("pac_bayes_flatness", "1 / sigma^2", POSITIVE, "no sigma in [2^-10, 2^10] costs just that accuracy"),
        Number(
            "pac_bayes_sigma",
            "largest deviation of weight noise that costs at most `drop` of accuracy",
            POSITIVE,
            "no such sigma in [2^-10, 2^10]",
        ),
        Number("pac_bayes_accuracy_drop", "clean accuracy - mean accuracy at that sigma", REAL, "no such sigma"),
    ),
    _measure(
        "input_gradient_norm",
        "Drucker and Le Cun 1992",
        *_of_input("log_input_gradient_norm", "log ||grad_x l||_2 over C x H x W, at test images"),
    ),
    _measure(
        "input_curvature",
        "Moosavi-Dezfooli et al. 2019",
        *_of_input("log_input_curvature", "log ||Hessian_x l||_2 at test images, by the power method"),
    ),
    _measure(
        "lipschitz",
        OURS,
        Number(
            "lipschitz_upper",
            "product of the layers' spectral norms along the graph of phi: a bound",
            LIPSCHITZ,
            "a part of the network has no bound, such as attention",
        ),
        Number("lipschitz_jacobian_{statistic}", "||J phi(x)||_2 at test images, by the power method", LIPSCHITZ),
        Number("lipschitz_jacobian_max", "the largest of any image", LIPSCHITZ),
        Number(
            "certified_radius_{threshold}_{quantile}",
            "radius for a loss increase e with lipschitz_upper",
            DISTANCE,
            "it is infinite; absent without lipschitz_upper",
        ),
        Number(
            "estimated_radius_jacobian_{threshold}_{quantile}",
            "the same with lipschitz_jacobian_max: no guarantee",
            DISTANCE,
            "it is infinite",
        ),
    ),
    _measure(
        "detector",
        f"{PAPER}, appendix D.4",
        *_detector("detector", "against PGD-linf"),
        *_detector(
            "detector_adaptive_lambda{strength}",
            "against PGD on l - lambda (log kappa - its clean mean)^2",
            Number("detector_adaptive_lambda{strength}_flip_rate", FLIPS, SHARE, "no image is clean-correct"),
        ),
        *_detector(
            "detector_adaptive",
            "against the lambda of the lowest accuracy; absent if no lambda has one",
            Number("detector_adaptive_flip_rate", FLIPS, SHARE),
            Number("detector_adaptive_strength", "that lambda", Unit("0.01, 0.1 or 1", 0.01, 1)),
        ),
    ),
)
