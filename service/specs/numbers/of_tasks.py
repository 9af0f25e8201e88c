"""The numbers that trainings and panels of controls leave, and those that the service computes from all tasks."""

from service.specs.numbers.base import COUNT, FLAG, LOSS, OURS, PAPER, SECONDS, SHARE, Group, Number, Unit

TESTED = (
    Number("test_accuracy", "all test images: right by the float32 logits", SHARE),
    Number("test_loss", "mean cross-entropy of the finite test images", LOSS),
    Number("test_top5_accuracy", "y among the five highest logits", SHARE, "five classes or fewer"),
    Number("parameters", "numbers in the network's parameters", COUNT),
    Number("seconds", "of all epochs, or of testing registered weights; `train_seconds` in a result", SECONDS),
)
NO_TWIN = "the attack takes no gradient, or there is no bit of it at s = 1"

GROUPS = (
    Group(
        "tested network",
        "train",
        "every training, registered weights too",
        "workers/science/evaluation.py",
        PAPER,
        TESTED,
    ),
    Group(
        "training",
        "train",
        "every training of this service",
        "workers/science/training.py",
        PAPER,
        (
            Number("train_accuracy", "in the kept epoch, on augmented images, while the weights move", SHARE),
            Number("train_loss", "mean of the recipe's loss in the kept epoch", Unit("the recipe's loss", 0)),
            Number("train_samples", "images of an epoch", COUNT),
            Number("dropped_samples", "images left out because they would be a last batch of one", COUNT),
            Number("kept_epoch", "the epoch whose weights are kept", Unit("epoch, from 1", 1, whole=True)),
            Number(
                "held_out_robust_accuracy",
                "of held-out training images under the recipe's attack",
                SHARE,
                "the last epoch is kept",
                "Rice et al. 2020",
            ),
            Number("epochs", "epochs trained", COUNT),
            Number("images_per_second", "train_samples x epochs / seconds", Unit("images in a second", 0)),
        ),
    ),
    Group(
        "registered weights",
        "train",
        "weights from elsewhere",
        "workers/science/imported.py",
        OURS,
        (
            Number("clean_accuracy_at_chance", "1 if Wilson's lower end <= the share of the most frequent label", FLAG),
            Number("test_n_non_finite", "test images with NaN or infinite logits", COUNT),
        ),
    ),
    Group(
        "control",
        "control",
        "the panel",
        "workers/science/controls.py",
        OURS,
        (
            Number("n", "images that the panel looked at", COUNT),
            Number("n_non_finite", "those with NaN or infinite clean logits", COUNT),
            Number("train_mode_modules", "modules that are not in eval mode", COUNT),
            Number("random_forward_changed", "images whose logits differ between two forward passes", COUNT),
            Number("batch_dependent_changed", "images whose logits depend on their batch, of 16 a batch", COUNT),
            Number("eps_zero_changed", "images whose outcome at eps = 0 is not the clean one", COUNT),
        ),
    ),
    Group(
        "verdict",
        "job",
        "every finished job",
        "service/model/verdict.py",
        OURS,
        (
            Number(
                "masked_fraction",
                "clean-correct, robust at s, broken at s = 1 by it or its margin twin, / masked_n",
                SHARE,
                NO_TWIN,
            ),
            Number(
                "masked_fraction_of_correct",
                "the same / clean-correct among masked_n",
                SHARE,
                f"{NO_TWIN}, or no image is clean-correct",
            ),
            Number("masked_n", "images that the margin twin ran on; n where there is none", COUNT, NO_TWIN),
            Number(
                "reverse_fraction",
                "clean-correct, broken at s, robust at s = 1, / n",
                SHARE,
                "there is no bit of the attack at s = 1",
            ),
            Number(
                "verdict_counts.{check}",
                "images that the check found, and of how many it looked at",
                COUNT,
                "the check was not run, or counts no images",
            ),
        ),
    ),
    Group(
        "intervals",
        "job",
        "every finished job, at read time",
        "service/model/observations.py",
        "Wilson 1927",
        (
            Number(
                "{share}_ci95_{end}",
                "end of the 95 % score interval of the share",
                SHARE,
                "the share or its number of images is null",
            ),
        ),
    ),
)
