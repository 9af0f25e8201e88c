"""Training, attacks and measures: tensors in, numbers out.

It needs torch, torchvision, timm, NumPy, SciPy, scikit-learn and safetensors. It imports neither the service nor Ray,
SQL or HTTP libraries, so that it runs by itself on any machine with a GPU.
"""
