"""The same network trained by what people would use instead, and by this project: a program each.

Each takes a number of epochs and, but for this project, a file of images. It does the same work (an epoch over the
training images in batches of 128, then loss and accuracy on the validation images) and prints a JSON line an epoch,
then its peak memory. `optuna_study` trains one network after the other, as the tuning study does, and prints a line
for each.
"""
