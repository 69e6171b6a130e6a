"""VGG on ImageNet (Simonyan & Zisserman, arXiv 1409.1556): data, network, training, evaluation.

Nothing here depends on Kubeflow, MLflow, DVC or S3.
"""
