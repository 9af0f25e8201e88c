"""The numbers that attacks leave: outcomes, the way along the trajectory, and the bounds."""

from service.specs.numbers.base import (
    COUNT,
    DISTANCE,
    LIPSCHITZ,
    LOSS,
    LOSS_CHANGE,
    OURS,
    PAPER,
    SHARE,
    STEPS,
    Group,
    Number,
)

NO_CORRECT = "no image is clean-correct"
NOT_BALL = "the attack has no ball"
FOLLOWED = "attacks with iterates, in float32, judged by the final iterate"
FROM_THE_IMAGE = "those of them that start at the image"

OUTCOME = Group(
    "attack",
    "attack",
    "every attack",
    "workers/science/evaluation.py",
    PAPER,
    (
        Number("n", "images attacked, n", COUNT, source=OURS),
        Number("n_non_finite", "images that met a NaN or an infinity; their bits are false", COUNT, source=OURS),
        Number("n_clean_correct", "finite images classified as y before the attack", COUNT),
        Number("clean_accuracy", "n_clean_correct / n", SHARE),
        Number("clean_loss", "mean of log(1 + sum_{j != y} exp(z_j - z_y)) over finite clean images", LOSS),
        Number("robust_accuracy", "clean-correct and correct on the judged example, / n", SHARE),
        Number("robust_accuracy_of_correct", "the same / n_clean_correct", SHARE, NO_CORRECT),
        Number("robust_accuracy_any_iterate", "clean-correct and correct on every iterate, / n", SHARE),
        Number(
            "robust_top5_accuracy",
            "y among the five highest logits, clean and judged, / n",
            SHARE,
            "five classes or fewer",
        ),
        Number("robust_loss", "mean cross-entropy of the judged examples, finite ones", LOSS),
        Number("flip_rate", "1 - robust_accuracy_of_correct", SHARE, NO_CORRECT),
        Number(
            "zero_gradient_fraction",
            "float32 input gradient exactly 0 at step 0, of clean-correct",
            SHARE,
            f"the attack takes no gradient, or {NO_CORRECT}",
            OURS,
        ),
        Number(
            "zero_gradient_fraction_of_all",
            "the same of all finite images, / n",
            SHARE,
            "the attack takes no gradient",
            OURS,
        ),
        Number("max_perturbation_linf", "largest |x_adv - x| of any pixel of any finite image", DISTANCE, source=OURS),
        Number("max_perturbation_l2", "largest ||x_adv - x||_2 over C x H x W", DISTANCE, source=OURS),
        Number("outside_ball", "images with linf > eps + 1e-6, or l2 > eps (1 + 1e-5) + 1e-6", COUNT, NOT_BALL, OURS),
        Number("outside_box", "images with a pixel outside [0, 1]", COUNT, source=OURS),
        Number("loss_increase_{statistic}", "cross-entropy of the judged example - that of the image", LOSS_CHANGE),
        Number("loss_increase_clean_correct_{statistic}", "the same, of clean-correct images", LOSS_CHANGE, NO_CORRECT),
        Number(
            "majority_share", "share of the most frequent label: what a constant answer gets right", SHARE, source=OURS
        ),
        Number("gradient_calls", "backward passes, summed over batches", COUNT, source=OURS),
        Number("forward_calls", "forward passes of the attack, summed over batches", COUNT, source=OURS),
    ),
)

TRAJECTORY = Group(
    "trajectory",
    "attack",
    FOLLOWED,
    "workers/science/trajectory.py",
    OURS,
    (
        Number("trajectory_n", "finite examples that were followed", COUNT),
        Number("trajectory_n_clean_correct", "those of them that iterate 0 has right", COUNT),
        Number("valley_n", "clean-correct examples that flip and moved", COUNT),
        Number(
            "valley_{valley}",
            "of valley_n: 0 < t_peak < T, v_peak >= 10 v_0, v_T <= v_peak / 10, l_T > l_peak",
            SHARE,
            "valley_n is 0",
            f"{PAPER}; the criterion: {OURS}",
        ),
        Number("valley_loose_{valley}", "of trajectory_n: t_peak < T, v_T < v_peak / 10", SHARE),
        Number("peak_at_start_{valley}", "of valley_n: t_peak = 0", SHARE, "valley_n is 0"),
        Number(
            "take_off_{quantile}",
            "t + 1 of the largest l_{t+2} - 2 l_{t+1} + l_t, if that is > 0",
            STEPS,
            "take_off_n is 0",
            PAPER,
        ),
        Number("take_off_n", "clean-correct examples that moved and have a take-off", COUNT),
        Number("take_off_n_none", "clean-correct examples that moved and have none", COUNT),
        Number(
            "trajectory_loss_increase_{statistic}{population}", "l_T - l_0 of restart 0", LOSS_CHANGE, NO_CORRECT, PAPER
        ),
        Number("trajectory_flip_rate", "of clean-correct: iterate T is misclassified", SHARE, NO_CORRECT),
        Number(
            "trajectory_flip_rate_any_iterate", "of clean-correct: some iterate is misclassified", SHARE, NO_CORRECT
        ),
        Number(
            "trajectory_still_rising_fraction",
            "of clean-correct: l_T > l_{T-1}",
            SHARE,
            f"{NO_CORRECT}, or there is one iterate",
        ),
    ),
)

CENSORED = "more than that share of examples never gets there, or basin_n is 0"
BASIN = Group(
    "basin width",
    "attack",
    FROM_THE_IMAGE,
    "workers/science/trajectory.py",
    f"{PAPER}; the definition: {OURS}",
    (
        Number("basin_n", "clean-correct examples that moved", COUNT),
        Number("basin_n_blind", "clean-correct examples that did not move; left out", COUNT),
        Number(
            "basin_width_{threshold}_{quantile}",
            "||x_t - x_0|| in the attack's norm, t = min{t: l_t - l_0 > e}",
            DISTANCE,
            CENSORED,
        ),
        Number("basin_width_l2_{threshold}_{quantile}", "the same in l2", DISTANCE, CENSORED),
        Number("basin_steps_{threshold}_{quantile}", "that t", STEPS, CENSORED),
        Number("basin_censored_fraction_{threshold}", "of basin_n: l_t - l_0 never exceeds e", SHARE, "basin_n is 0"),
    ),
)

BOUNDS = Group(
    "bounds",
    "attack",
    "every attack on a network with a linear head",
    "workers/science/bounds.py",
    OURS,
    (
        Number("bound_n", "points checked: all iterates of all examples, or one for each example", COUNT),
        Number("bound_n_examples", "examples checked", COUNT),
        Number(
            "bound_violated_{bound}",
            "of bound_n: the loss rose by more than the bound with L d realised",
            SHARE,
            "bound_n is 0",
        ),
        Number(
            "bound_violated_examples_{bound}",
            "of bound_n_examples: some point violates the bound",
            SHARE,
            "bound_n is 0",
        ),
        Number("bound_{bound}_median", "median of the bound on l - l_0 at the last point", LOSS, "it is infinite"),
    ),
)


def _lipschitz(name: str, of: str, where: str) -> Group:
    return Group(
        f"Lipschitz constant, {where}",
        "attack",
        of,
        "workers/science/bounds.py",
        OURS,
        (
            Number(
                f"lipschitz_{name}_{{statistic}}",
                f"largest ||phi(x_t) - phi(x_0)|| / ||x_t - x_0||_2 {where}",
                LIPSCHITZ,
                "no example moved",
            ),
            Number(f"lipschitz_{name}_max", "the largest of any example", LIPSCHITZ, "no example moved"),
            Number(
                f"estimated_radius_{name}_{{threshold}}_{{quantile}}",
                f"(logaddexp(log expm1(e), e + log S) - log S) / (D_y L), L = lipschitz_{name}_max: no guarantee",
                DISTANCE,
                "it is infinite",
            ),
        ),
    )


GROUPS = (
    OUTCOME,
    TRAJECTORY,
    BASIN,
    BOUNDS,
    _lipschitz("path", FROM_THE_IMAGE, "on the path"),
    _lipschitz("returned", "all other attacks", "at the returned example"),
)
