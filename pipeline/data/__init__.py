"""Data: an index of the images, a plan of what each goes through, and executors that turn plans into tensors."""
