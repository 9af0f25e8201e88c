"""The examples of the OpenAPI document: requests that work, and answers as they come."""

from service.model.json import JsonObject

JOB_ID = "01939d3e-7b1f-7c3e-a2d4-5f60718293a4"
DIGEST = "9c818143cfd10e15676234d9e38dbf9e0d968d847d151aa08a8cf4f190080b17"
JOB_EXAMPLE: JsonObject = {
    "architecture": "simple_cnn",
    "dataset": "digits",
    "scale": 5,
    "attack": {"type": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 10},
    "recipe": {"name": "standard", "epochs": 5},
    "samples": 200,
}
SWEEP_EXAMPLE: JsonObject = {
    "name": "scales of a small net",
    "base": {"dataset": "digits", "recipe": {"name": "standard", "epochs": 5}, "samples": 200},
    "grid": {"architecture": ["simple_cnn", "mlp"], "scale": [0.5, 1, 5], "attack": ["pgd_l2", "pgd_linf"]},
}
MEASURE_EXAMPLE: JsonObject = {
    "kind": "measure",
    "version": 1,
    "checkpoint": DIGEST,
    "measure": {"type": "closed_forms"},
    "scale": 5.0,
    "scale_bias": True,
    "samples": 200,
}
MEASURE_DIGEST = "2ff9f2560789cbcb77919ee22236745c2e66c44cdf316a4a181251b8c43cf979"
CANONICAL_EXAMPLE = (
    f'{{"checkpoint":"{DIGEST}","kind":"measure","measure":{{"type":"closed_forms"}},"samples":200,"scale":5.0,'
    '"version":1}'
)
ATTEMPT_EXAMPLE: JsonObject = {
    "number": 1,
    "holder": "node-1",
    "worker": "node-3 pid 4711 cuda:0",
    "started_at": "2026-01-01T12:00:00.000Z",
    "ended_at": "2026-01-01T12:00:04.000Z",
    "end": "succeeded",
    "message": None,
    "traceback": None,
    "provenance": {"torch": "2.11.0", "device": "NVIDIA H100 80GB HBM3", "wall_seconds": 3.9},
}
RESULT_EXAMPLE: JsonObject = {
    **JOB_EXAMPLE,
    "job_id": JOB_ID,
    "clean_accuracy": 0.97,
    "robust_accuracy": 0.55,
    "robust_accuracy_ci95_low": 0.481,
    "robust_accuracy_ci95_high": 0.617,
    "verdict": "trusted",
    "verdict_reasons": [],
    "log_relative_sharpness_median": -34.1,
}
DATASET_EXAMPLE: JsonObject = {"name": "my_images", "train_sha256": DIGEST, "test_sha256": DIGEST}
RETRACTION_EXAMPLE: JsonObject = {"reason": "the attack clipped to [0, 255]", "rerun": True}
RETRACTIONS_EXAMPLE: JsonObject = {
    "filter": "versions.attack = 1 and attack = apgd",
    "reason": "wrong step size",
    "rerun": False,
}
RESTORATIONS_EXAMPLE: JsonObject = {"filter": "retraction_reason = 'wrong step size'"}
