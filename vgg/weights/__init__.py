"""Other people's weights: files of torchvision, timm, Keras and Caffe, read without running anything in them."""
