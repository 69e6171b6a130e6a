"""VGG on ImageNet: the science (Simonyan & Zisserman, arXiv 1409.1556).

shard → train → evaluate → register.  Nothing here knows of Kubeflow, MLflow, DVC or S3.
"""
